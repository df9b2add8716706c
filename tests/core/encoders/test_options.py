"""Options of the encoders from words."""

import inspect

import pytest

from braindino.encoders.bm_mae import BMMAE
from braindino.encoders.brainiac import BrainIAC
from braindino.encoders.brainmvp import BrainMVP
from braindino.encoders.intensity import IntensityFloor
from braindino.encoders.options import OPTIONS, parse_options
from braindino.encoders.slice_encoder import SlicePreparation
from braindino.encoders.slice_transformer import SliceTransformer
from braindino.encoders.timm_encoder import TimmEncoder


def test_words_become_values_of_their_types():
    words = ["fit=resize", "num_slices=64", "stages=1,2,4", "inner_norm=false", "weights=a=b.pth"]
    assert parse_options(words) == {
        "fit": "resize",
        "num_slices": 64,
        "stages": (1, 2, 4),
        "inner_norm": False,
        "weights": "a=b.pth",
    }
    assert parse_options([]) == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["num_slices"], "option 'num_slices': expected name=value, such as num_slices=64"),
        (["slices=64"], "option 'slices=64': no encoder has 'slices'; the options are feature, fit, image_size"),
        (["num_slices=6.4"], "option 'num_slices=6.4': expected a whole number"),
        (["inner_norm=yes"], "option 'inner_norm=yes': expected true or false"),
        (["stages=1,2"], "option 'stages=1,2': expected three whole numbers"),
        (["stages=1,2,x"], "option 'stages=1,2,x': expected a whole number"),
        (["fit=crop", "fit=resize"], "option 'fit': given twice"),
    ],
)
def test_what_is_no_option_is_refused(words: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        parse_options(words)


def test_every_option_of_every_encoder_can_be_given_and_no_other():
    found = {"weights", *SlicePreparation.__dataclass_fields__}
    for encoder in (BMMAE, BrainIAC, BrainMVP, IntensityFloor, SliceTransformer, TimmEncoder):
        parameters = inspect.signature(encoder).parameters.values()
        found |= {each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY} - {"name"}
    assert found == set(OPTIONS)
