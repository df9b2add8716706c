"""``braindino <verb>``: the front door. Each verb is a room's own program, imported only when it is called."""

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from braindino.command_line import EXIT_DONE, EXIT_INTERRUPTED, EXIT_USAGE


class Verb(NamedTuple):
    """Where a verb's ``main(argv) -> exit code`` lives, and what it does."""

    module: str
    summary: str


VERBS = {
    "doctor": Verb("braindino.doctor", "what this machine has, and what would be used"),
    "demo": Verb("braindino.demo", "the whole way on a simulated cohort: scans to segmentation, diagnosis and report"),
    "simulate": Verb("braindino.simulation.simulate", "write a simulated cohort in BIDS"),
    "cohorts": Verb("braindino.preprocessing.list_cohorts", "the published cohorts that can be prepared by name"),
    "labels": Verb("braindino.preprocessing.labels", "a cohort's published tables to one tidy table of labels"),
    "fetch-hd-bet": Verb("braindino.preprocessing.hd_bet_weights", "download the weights of HD-BET 2, once"),
    "prepare": Verb("braindino.preprocessing.prepare", "raw scans to skull-stripped, normalised slices"),
    "perturb": Verb("braindino.preprocessing.perturb", "raw scans under gamma, Gibbs ringing and bias fields"),
    "verify": Verb("braindino.store_verify", "find damage in a slice store, to the byte"),
    "merge": Verb("braindino.store_merge", "several slice stores into one"),
    "subset": Verb("braindino.store_subset", "part of a slice store, by cohort, sequence or subject"),
    "stats": Verb("braindino.report.corpus", "slices, scans and subjects of a store, as table and figure"),
    "audit": Verb("braindino.audit", "was anything that is tested on pretrained on, under whatever name"),
    "split": Verb("braindino.hold_out", "choose the subjects to hold out, once for every room"),
    "pretrain": Verb("braindino.pretrain.train", "DINOv3-style self-distillation on slices"),
    "export": Verb("braindino.pretrain.export", "an encoder for timm, transformers or DINOv3's loaders, with a card"),
    "nnunet": Verb("nnunet_braindino.cli", "convert and check for the nnU-Net trainers"),
    "convert-brats": Verb("nnunet_braindino.convert_brats", "a BraTS training set to an nnU-Net dataset"),
    "segment": Verb("nnunet_braindino.predict", "whole volumes with a trained model, as nnUNetv2_predict, sooner"),
    "segment-eval": Verb("nnunet_braindino.segment_eval", "Dice and HD95 of trainers side by side, with intervals"),
    "extract": Verb("braindino.downstream.extract", "features of prepared scans from a frozen encoder"),
    "evaluate": Verb("braindino.downstream.evaluate", "light heads and kNN on features, with intervals"),
    "represent": Verb("braindino.downstream.represent", "how encoders see the same scans: CKA, spread, neighbours"),
    "robustness": Verb("braindino.downstream.robustness", "what trained heads make of perturbed scans"),
    "tasks": Verb("braindino.downstream.list_tasks", "what can be evaluated, and how"),
    "reproduce": Verb("braindino.downstream.reproduce", "the same numbers again, from what an evaluation left"),
    "view": Verb("braindino.viewer.view", "look at a scan; a click shows what looks alike to an encoder"),
    "figure": Verb("braindino.report.figure", "a paper figure from any runs: PDF, SVG, PNG and its table"),
    "report": Verb("braindino.report.page", "static pages with everything a folder holds, and its figures"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; its exit code, one of those in ``command_line``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return EXIT_DONE if arguments else EXIT_USAGE
    if arguments[0] == "--version":
        from braindino import __version__

        print(__version__)
        return EXIT_DONE
    verb, *rest = arguments
    if verb not in VERBS:
        print(f"braindino: no verb {verb!r}\n\n{_usage()}", file=sys.stderr)
        return EXIT_USAGE
    # Programs that name themselves in their usage line should name the verb.
    sys.argv = [f"braindino {verb}", *rest]
    try:
        module = importlib.import_module(VERBS[verb].module)
    except KeyboardInterrupt:  # libraries take seconds to load
        print(f"braindino {verb}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return module.main(rest)


def _usage() -> str:
    lines = ["usage: braindino VERB [...]   (braindino VERB -h tells more)", ""]
    lines += [f"  {name:<13} {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
