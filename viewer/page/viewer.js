// The page of `braindino view`. It asks its own server for scans and similarity maps and lets NiiVue draw them.
// Voxels are those of the scan in RAS+, millimetres those of its own world. A click sets the reference point; the map
// shown is that of the axial slice under the crosshair, so that scrolling compares other slices with the same point.

const { Niivue, NVImage, SLICE_TYPE } = window.niivue;
const TOKEN_HEADER = "X-BrainDINO-Token";
const OUTSIDE = -1.5; // the server writes -2 where there is no similarity
// ColorBrewer's RdBu, from -1, blue, to 1, red: the scale of the report's maps.
const SIMILARITY_COLOURS = [
  [5, 48, 97], [33, 102, 172], [67, 147, 195], [146, 197, 222], [209, 229, 240], [247, 247, 247],
  [253, 219, 199], [244, 165, 130], [214, 96, 77], [178, 24, 43], [103, 0, 31],
];
// Okabe and Ito's, safe for the colour-blind; labels beyond the eighth begin again.
const LABEL_COLOURS = [
  [230, 159, 0], [86, 180, 233], [0, 158, 115], [240, 228, 66], [0, 114, 178], [213, 94, 0], [204, 121, 167], [153, 153, 153],
];
const MASK_COLOUR = [53, 194, 154];
const SECONDS_BEFORE_WORKING = 0.15;
// Without a graphics card the 3D rendering takes most of the time of a click: off after two such pictures.
const SLOW_PICTURE_SECONDS = 0.3;

const element = (id) => document.getElementById(id);
const show = (id, visible) => { element(id).hidden = !visible; };
const say = (id, text) => { element(id).textContent = text; };

const state = {
  scene: null, // what the server has
  scan: null, // facts of the scan shown
  encoder: null,
  block: 0,
  reference: null, // voxel that the map compares with
  crosshair: null, // voxel
  smooth: true,
  map: null, // what the server said of the map shown
  layers: { similarity: layer("Similarity", 0.65), mask: layer("Brain mask", 0.3, false), segmentation: layer("Segmentation", 0.5) },
  image: null, // the scan as NiiVue holds it
  overlays: {}, // mask, segmentation: { values, edges } on the scan's voxels, x fastest
  drawnLayer: null, // the layer of the scan that the map was drawn on
  render: true,
  renderChosen: false, // by the user: then it stays
  slowPictures: 0,
  pressing: false,
  asking: false,
  askAgain: false,
  opening: 0, // number of the scan that was asked for last
};

function layer(title, opacity, on = true) {
  return { title, opacity, on };
}

// ---- server ----

class ServerError extends Error {
  constructor(status, { what, where, next }) {
    super(what);
    Object.assign(this, { status, where, next });
  }
}

function takeToken() {
  const given = location.hash.slice(1);
  if (given) {
    sessionStorage.setItem("token", given);
    history.replaceState(null, "", location.pathname); // not kept in the history, nor shown to who looks on
  }
  return sessionStorage.getItem("token") ?? "";
}

async function ask(address, body) {
  const options = { headers: { [TOKEN_HEADER]: state.token }, cache: "no-store" };
  if (body) {
    options.method = "POST";
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(address, options);
  } catch {
    throw new ServerError(0, { what: "The viewer does not answer.", where: "", next: "Is `braindino view` still running in its terminal? Start it again and open the address it prints." });
  }
  if (!response.ok) {
    let error = { what: `The viewer answered ${response.status}.`, where: address, next: "" };
    if (response.headers.get("Content-Type")?.startsWith("application/json")) error = (await response.json()).error;
    throw new ServerError(response.status, error);
  }
  if (response.headers.get("Content-Type").startsWith("application/json")) return response.json();
  return response.arrayBuffer();
}

function tell(error) {
  // Two causes: the server said so, or the page itself is at fault; the second is for the console too.
  if (!(error instanceof ServerError)) console.error(error);
  say("error-what", error.message);
  say("error-where", error.where ?? "");
  say("error-next", error.next ?? "");
  show("error", true);
}

// ---- drawing ----

const nv = new Niivue({
  backColor: [0.043, 0.051, 0.063, 1],
  crosshairColor: [1, 0.78, 0.2, 0.85],
  crosshairWidth: 0.4,
  crosshairGap: 5,
  fontColor: [0.72, 0.76, 0.8, 1],
  dragAndDropEnabled: false,
  isForceMouseClickToVoxelCenters: true,
  isRadiologicalConvention: true,
  loadingText: "",
  logLevel: "error",
  show3Dcrosshair: true,
});

// NiiVue draws at every event, several times a click; one picture a frame is enough. Without a graphics card each takes
// a quarter of a second, and they would be waited for one after another.
const drawNow = nv.drawScene.bind(nv);
let planned = 0;
nv.drawScene = () => {
  planned ||= requestAnimationFrame(() => {
    planned = 0;
    drawNow();
  });
};

// Overlays are put together here and handed to the graphics card as one texture. NiiVue's own way would resample every
// overlay over the whole volume at every click; a map changes one layer.

const OVERLAY_UNIT = 0x84c2; // gl.TEXTURE2, where NiiVue looks for the colours over the scan

const similarityTable = (() => {
  const table = new Uint8Array(256 * 3);
  for (let entry = 0; entry < 256; entry++) {
    const place = (entry / 255) * (SIMILARITY_COLOURS.length - 1);
    const lower = Math.min(Math.floor(place), SIMILARITY_COLOURS.length - 2);
    for (let channel = 0; channel < 3; channel++) {
      const [low, high] = [SIMILARITY_COLOURS[lower][channel], SIMILARITY_COLOURS[lower + 1][channel]];
      table[3 * entry + channel] = Math.round(low + (high - low) * (place - lower));
    }
  }
  return table;
})();

// Voxels with a face towards another value: a contour in every plane. In thick slices only within the slice: a border
// between two of them would fill what it should outline.
function findEdges(values, { shape: [nx, ny, nz], spacing }) {
  const thick = spacing[2] > 2 * spacing[0];
  const edges = new Uint8Array(values.length);
  const [row, plane] = [nx, nx * ny];
  for (let z = 0, at = 0; z < nz; z++) {
    for (let y = 0; y < ny; y++) {
      for (let x = 0; x < nx; x++, at++) {
        const value = values[at];
        if (!value) continue;
        if (
          (x > 0 && values[at - 1] !== value) || (x < nx - 1 && values[at + 1] !== value) ||
          (y > 0 && values[at - row] !== value) || (y < ny - 1 && values[at + row] !== value) ||
          (!thick && ((z > 0 && values[at - plane] !== value) || (z < nz - 1 && values[at + plane] !== value)))
        ) edges[at] = 1;
      }
    }
  }
  return edges;
}

function paint(pixels, at, red, green, blue, alpha) {
  const under = pixels[at + 3] / 255;
  const over = alpha + under * (1 - alpha);
  if (over <= 0) return;
  const keep = under * (1 - alpha);
  pixels[at] = (red * alpha + pixels[at] * keep) / over;
  pixels[at + 1] = (green * alpha + pixels[at + 1] * keep) / over;
  pixels[at + 2] = (blue * alpha + pixels[at + 2] * keep) / over;
  pixels[at + 3] = 255 * over;
}

const opacityOf = (name) => (state.layers[name].on ? state.layers[name].opacity : 0);

// The colours over layer z, into pixels from offset on: map, then segmentation, then mask.
function paintLayer(z, pixels, offset) {
  const [nx, ny] = state.scan.shape;
  const size = nx * ny;
  const alpha = opacityOf("similarity");
  if (alpha && state.map?.values && state.map.layer === z) paintMap(pixels, offset, alpha);
  const { segmentation, mask } = state.overlays;
  const labelAlpha = opacityOf("segmentation");
  if (segmentation && labelAlpha) {
    const rim = Math.min(1, labelAlpha + 0.4);
    for (let index = 0, at = z * size; index < size; index++, at++) {
      const value = segmentation.values[at];
      if (value) paint(pixels, offset + 4 * index, ...state.labelColours.get(value), segmentation.edges[at] ? rim : labelAlpha);
    }
  }
  const maskAlpha = opacityOf("mask");
  if (mask && maskAlpha) {
    for (let index = 0, at = z * size; index < size; index++, at++) {
      if (mask.edges[at]) paint(pixels, offset + 4 * index, ...MASK_COLOUR, maskAlpha);
    }
  }
}

function paintMap(pixels, offset, alpha) {
  const { values, cells, reference, slice, referenceSlice } = state.map;
  const [nx, ny] = state.scan.shape;
  const [alongX, alongY] = cells;
  for (let index = 0, at = offset; index < values.length; index++, at += 4) {
    if (values[index] <= OUTSIDE) continue;
    const entry = 3 * Math.round(127.5 * (1 + Math.min(1, Math.max(-1, values[index]))));
    paint(pixels, at, similarityTable[entry], similarityTable[entry + 1], similarityTable[entry + 2], alpha);
  }
  if (slice !== referenceSlice) return;
  const [left, right] = [alongX.indexOf(reference[0]), alongX.lastIndexOf(reference[0])];
  const [back, front] = [alongY.indexOf(reference[1]), alongY.lastIndexOf(reference[1])];
  for (let y = back; y <= front; y++) {
    for (let x = left; x <= right; x++) {
      const rim = x === left || x === right || y === back || y === front;
      if (rim && x >= 0 && y >= 0 && x < nx && y < ny) paint(pixels, offset + 4 * (y * nx + x), 20, 20, 20, 1);
    }
  }
}

function bindOverlay() {
  nv.gl.activeTexture(OVERLAY_UNIT);
  nv.gl.bindTexture(nv.gl.TEXTURE_3D, nv.overlayTexture);
  nv.gl.pixelStorei(nv.gl.UNPACK_ALIGNMENT, 1);
}

function sendLayers(z, depth, pixels) {
  const [nx, ny] = state.scan.shape;
  bindOverlay();
  nv.gl.texSubImage3D(nv.gl.TEXTURE_3D, 0, 0, 0, z, nx, ny, depth, nv.gl.RGBA, nv.gl.UNSIGNED_BYTE, pixels);
}

// All layers: when a scan was opened, or the way it is drawn has changed.
function drawOverlays() {
  const [nx, ny, nz] = state.scan.shape;
  const pixels = new Uint8ClampedArray(4 * nx * ny * nz);
  for (let z = 0; z < nz; z++) paintLayer(z, pixels, 4 * nx * ny * z);
  sendLayers(0, nz, new Uint8Array(pixels.buffer));
  state.drawnLayer = state.map?.layer ?? null;
  draw();
}

// The layer that had the map and the one that has it now.
function drawMap() {
  const [nx, ny] = state.scan.shape;
  for (const z of new Set([state.drawnLayer, state.map?.layer ?? null])) {
    if (z === null) continue;
    const pixels = new Uint8ClampedArray(4 * nx * ny);
    paintLayer(z, pixels, 0);
    sendLayers(z, 1, new Uint8Array(pixels.buffer));
  }
  state.drawnLayer = state.map?.layer ?? null;
  draw();
}

// One pixel is read back: only then the picture is there, and the time is that of the drawing. It also keeps pictures
// from piling up where a processor has to draw them.
function draw() {
  const begun = performance.now();
  cancelAnimationFrame(planned);
  planned = 0;
  drawNow();
  nv.gl.readPixels(0, 0, 1, 1, nv.gl.RGBA, nv.gl.UNSIGNED_BYTE, new Uint8Array(4));
  const seconds = (performance.now() - begun) / 1000;
  state.slowPictures = state.render && seconds > SLOW_PICTURE_SECONDS ? state.slowPictures + 1 : 0;
  if (state.slowPictures < 2 || state.renderChosen) return;
  showRender(false);
  say("render-note", `The 3D rendering is off: a picture took ${seconds.toFixed(1)} s, as it does without a graphics card. R turns it on.`);
  show("render-note", true);
}

// A new scan needs an overlay of its own size; NiiVue mixes one in when it counts one.
function prepareOverlay() {
  nv.overlays = [state.image];
  nv.refreshLayers(state.image, 0);
  nv.overlayTexture = nv.rgbaTex(nv.overlayTexture, OVERLAY_UNIT, [3, ...state.scan.shape], true);
}

function arrange() {
  const { AXIAL, CORONAL, SAGITTAL, RENDER } = SLICE_TYPE;
  const right = state.render ? [CORONAL, SAGITTAL, RENDER] : [CORONAL, SAGITTAL];
  const height = 1 / right.length;
  const wide = 0.66;
  nv.setCustomLayout([
    { sliceType: AXIAL, position: [0, 0, wide, 1] },
    ...right.map((sliceType, index) => ({ sliceType, position: [wide, index * height, 1 - wide, height] })),
  ]);
}

function colourOfBar() {
  const stops = SIMILARITY_COLOURS.map((colour, index) => `rgb(${colour.join(" ")}) ${index * 10}%`);
  element("bar").style.background = `linear-gradient(to right, ${stops.join(", ")})`;
}

// ---- a scan ----

async function openScan(key, { layerOfSlice } = {}) {
  const mine = ++state.opening;
  document.body.dataset.state = "loading";
  show("error", false);
  cover("Reading the scan …");
  element("save-picture").disabled = true;
  try {
    const facts = await ask(`api/scans/${key}`);
    const image = await NVImage.new(await ask(`api/scans/${key}/volume`), "scan.nii", "gray", 1);
    [image.cal_min, image.cal_max] = facts.window;
    const overlays = {};
    if (facts.mask) overlays.mask = withEdges(new Uint8Array(await ask(`api/scans/${key}/mask`)), facts);
    if (facts.segmentation) overlays.segmentation = withEdges(new Int16Array(await ask(`api/scans/${key}/segmentation`)), facts);
    if (mine !== state.opening) return; // another scan was chosen meanwhile
    Object.assign(state, { scan: facts, image, overlays, map: null, reference: null, crosshair: null, drawnLayer: null });
    state.labelColours = new Map(facts.labels.map(({ value }, index) => [value, LABEL_COLOURS[index % LABEL_COLOURS.length]]));
    for (const old of [...nv.volumes]) nv.removeVolume(old);
    nv.addVolume(image);
    prepareOverlay();
    drawOverlays();
    describeScan();
    document.body.dataset.state = "ready";
    document.body.classList.add("has-scan");
    element("save-picture").disabled = false;
    const [x, y, z] = facts.centre;
    const start = [x, y, layerOfSlice === undefined ? z : sliceToLayer(layerOfSlice, facts)];
    state.reference = start;
    moveTo(start);
    clearNeighbours();
  } catch (error) {
    if (mine !== state.opening) return;
    document.body.dataset.state = state.scan ? "ready" : "failed";
    cover("No scan is shown");
    tell(error);
  }
}

function withEdges(values, facts) {
  return { values, edges: findEdges(values, facts) };
}

// Slice of the standard cube -> layer of the scan: the cube is the box of the brain, which the server measured.
function sliceToLayer(slice, facts) {
  const [low, high] = facts.brain;
  return Math.min(high, Math.max(low, Math.floor(low + ((slice + 0.5) * (high - low + 1)) / 256)));
}

function cover(text) {
  say("cover-text", text);
}

function nameOf(row) {
  return [row.subject, row.session].filter(Boolean).join(" · ");
}

function kindOf(row) {
  return [row.sequence === "unknown" ? "" : row.sequence, row.cohort].filter(Boolean).join(" · ");
}

function describeScan() {
  const facts = state.scan;
  const title = element("title");
  title.replaceChildren(nameOf(facts));
  const kind = document.createElement("small");
  kind.textContent = kindOf(facts);
  title.append(kind);
  document.title = `${nameOf(facts)} – BrainDINO view`;
  const rows = [
    ["Matrix", facts.shape.join(" × ")],
    ["Voxel", `${facts.spacing.map((size) => Number(size.toFixed(3))).join(" × ")} mm`],
  ];
  if (facts.notes.length) rows.push(["Notes", facts.notes.join(", ")]);
  element("facts").replaceChildren(...rows.map(([term, text]) => termRow(term, text)));
  say("warning", facts.warning);
  show("warning", facts.warning);
  const slider = element("layer");
  slider.max = facts.shape[2] - 1;
  buildLayers();
  element("legend").replaceChildren(...facts.labels.map((label, index) => {
    const item = document.createElement("li");
    const swatch = document.createElement("i");
    swatch.style.background = `rgb(${LABEL_COLOURS[index % LABEL_COLOURS.length].join(" ")})`;
    item.append(swatch, `${label.value}: ${label.ml} ml`);
    return item;
  }));
  for (const button of element("scan-list").querySelectorAll("button")) {
    button.setAttribute("aria-current", button.dataset.key === facts.key);
  }
}

function termRow(term, text) {
  const row = document.createElement("div");
  const dt = document.createElement("dt");
  const dd = document.createElement("dd");
  dt.textContent = term;
  dd.textContent = text;
  row.append(dt, dd);
  return row;
}

function buildLayers() {
  const rows = Object.entries(state.layers).map(([name, options]) => {
    const there = name === "similarity" ? state.encoder !== null : name in state.overlays;
    if (!there) return null;
    const row = document.createElement("div");
    row.className = "layer";
    const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: options.on, id: `on-${name}` });
    const label = Object.assign(document.createElement("label"), { htmlFor: box.id, textContent: options.title });
    const slider = Object.assign(document.createElement("input"), { type: "range", min: 0, max: 100, value: 100 * options.opacity, id: `opacity-${name}` });
    slider.setAttribute("aria-label", `Opacity of ${options.title}`);
    const value = document.createElement("output");
    const tellValue = () => { value.textContent = `${slider.value} %`; };
    box.addEventListener("change", () => { options.on = box.checked; drawOverlays(); });
    slider.addEventListener("input", () => { options.opacity = slider.value / 100; tellValue(); drawOverlays(); });
    tellValue();
    row.append(box, label, slider, value);
    return row;
  });
  element("layers").replaceChildren(...rows.filter(Boolean));
}

// ---- the crosshair ----

function moveTo(voxel) {
  nv.scene.crosshairPos = nv.vox2frac(voxel);
  nv.createOnLocationChange();
  nv.drawScene();
}

function moveBy(x, y, z) {
  if (!state.crosshair) return;
  const moved = [x, y, z].map((step, axis) => Math.min(state.scan.shape[axis] - 1, Math.max(0, state.crosshair[axis] + step)));
  moveTo(moved);
}

nv.onLocationChange = (location) => {
  if (!state.scan || nv.volumes[0] !== state.image) return;
  const voxel = Array.from(location.vox);
  const newLayer = state.crosshair === null || state.crosshair[2] !== voxel[2];
  state.crosshair = voxel;
  readOut();
  if (state.pressing) setReference(voxel);
  else if (newLayer || !state.map) askForMap();
};

function readOut() {
  const [x, y, z] = state.crosshair;
  const [nx, ny] = state.scan.shape;
  const at = x + nx * (y + ny * z);
  const mm = Array.from(nv.vox2mm(state.crosshair, state.image.matRAS)).slice(0, 3);
  say("at-voxel", state.crosshair.join(", "));
  say("at-mm", mm.map((value) => signed(value, 1)).join(", "));
  const intensity = state.image.getValue(x, y, z);
  say("at-intensity", Number.isInteger(intensity) ? String(intensity) : intensity.toPrecision(5));
  const labels = state.overlays.segmentation?.values;
  say("at-label", labels ? (labels[at] ? String(labels[at]) : "none") : "–");
  const drawn = state.map?.values && state.map.layer === z ? state.map.values[x + nx * y] : OUTSIDE;
  const there = drawn > OUTSIDE;
  // The token's own value, and what is drawn between the centres of tokens.
  const own = there ? state.map.grid[state.map.cells[0][x]][state.map.cells[1][y]] : 0;
  say("at-similarity", there ? `${signed(own, 3)}${state.map.smooth ? ` (drawn ${signed(drawn, 2)})` : ""}` : "–");
  show("here", there);
  if (there) element("here").style.left = `${50 * (1 + own)}%`;
  element("layer").value = z;
  say("layer-value", z);
}

const signed = (value, digits) => value.toFixed(digits).replace(/^-(?=.*[1-9])/, "−").replace(/^-/, "");

function setReference(voxel) {
  if (state.reference && state.reference.every((place, axis) => place === voxel[axis]) && state.map) return;
  state.reference = voxel;
  askForMap();
}

// ---- the map: one question at a time, the newest next ----

async function askForMap() {
  if (!state.encoder || !state.reference || document.body.dataset.state === "loading") return;
  if (state.asking) {
    state.askAgain = true;
    return;
  }
  state.asking = true;
  document.body.dataset.state = "working";
  const waiting = setTimeout(() => { say("working", `${state.encoder.name}: looking …`); show("working", true); }, 1000 * SECONDS_BEFORE_WORKING);
  const begun = performance.now();
  const { scan, encoder, block } = state;
  const body = { scan: scan.key, encoder: encoder.key, block, voxel: state.reference, layer: state.crosshair[2], smooth: state.smooth };
  try {
    const answer = await ask("api/similarity", body);
    if (state.scan === scan) showMap(answer, body, begun);
  } catch (error) {
    state.map = null;
    if (error.status !== 409) tell(error);
  } finally {
    clearTimeout(waiting);
    show("working", false);
    state.asking = false;
    if (document.body.dataset.state === "working") document.body.dataset.state = "ready";
    if (state.askAgain) {
      state.askAgain = false;
      askForMap();
    }
  }
}

function showMap(answer, body, begun) {
  const arrived = performance.now();
  state.map = { ...answer, ...body };
  show("outside", answer.outside);
  say("outside", answer.outside ?? "");
  if (!answer.outside) {
    const bytes = Uint8Array.from(atob(answer.map), (letter) => letter.charCodeAt(0));
    state.map.values = new Float32Array(bytes.buffer);
    show("error", false);
  }
  drawMap();
  readOut();
  const drawn = performance.now();
  describeMap(answer.outside ? null : answer, { all: drawn - begun, draw: drawn - arrived });
}

function describeMap(answer, times) {
  const { reference, encoder } = state;
  element("span").style.display = answer?.range ? "block" : "none";
  if (!answer) {
    for (const id of ["map-slice", "map-range", "map-time"]) say(id, "–");
    say("reference", `voxel ${reference.join(", ")}`);
    return;
  }
  const unit = encoder.slices ? "slice" : "plane";
  const same = answer.slice === answer.referenceSlice;
  const shown = state.map.voxel;
  say("reference", `voxel ${shown.join(", ")} · patch ${answer.reference.join(", ")} of ${answer.grid.length} × ${answer.grid[0].length}`);
  say("map-slice", `${unit} ${answer.slice} of ${answer.slices}${same ? "" : `, reference on ${answer.referenceSlice}`}`);
  if (answer.range) {
    const [low, high] = answer.range;
    say("map-range", `${signed(low, 2)} to ${signed(high, 2)}`);
    element("span").style.left = `${50 * (1 + low)}%`;
    element("span").style.right = `${50 * (1 - high)}%`;
  } else say("map-range", "no brain on this slice");
  const { encode, all } = answer.seconds;
  say("map-time", `${(times.all / 1000).toFixed(2)} s: encoder ${encode.toFixed(2)}, map ${(all - encode).toFixed(2)}, drawing ${(times.draw / 1000).toFixed(2)}`);
}

// ---- encoders and blocks ----

function chooseEncoder(encoder) {
  state.encoder = encoder;
  element("encoder").value = encoder.key;
  const last = encoder.blocks - 1;
  state.block = last;
  const buttons = Array.from({ length: encoder.blocks }, (_, block) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: String(block) });
    button.setAttribute("role", "radio");
    button.setAttribute("aria-label", `Block ${block}`);
    button.addEventListener("click", () => chooseBlock(block));
    return button;
  });
  element("blocks").replaceChildren(...buttons);
  show("block-field", encoder.blocks > 1);
  show("near-section", encoder.neighbours);
  clearNeighbours();
  chooseBlock(last);
}

function chooseBlock(block) {
  if (block < 0 || block >= state.encoder.blocks) return;
  state.block = block;
  [...element("blocks").children].forEach((button, index) => {
    button.setAttribute("aria-checked", index === block);
    button.tabIndex = index === block ? 0 : -1;
  });
  askForMap();
}

function chooseDrawing(smooth) {
  state.smooth = smooth;
  element("draw-smooth").setAttribute("aria-checked", smooth);
  element("draw-patches").setAttribute("aria-checked", !smooth);
  askForMap();
}

// ---- nearest slices ----

function clearNeighbours() {
  for (const picture of element("near-list").querySelectorAll("img")) URL.revokeObjectURL(picture.src);
  element("near-list").replaceChildren();
  say("near-note", "Slices of other subjects whose feature is most like that of the slice shown.");
}

async function findNeighbours() {
  if (!state.encoder?.neighbours || !state.scan || element("find-near").disabled) return;
  element("find-near").disabled = true;
  clearNeighbours();
  say("near-note", "Searching …");
  const layerShown = state.crosshair[2];
  const body = { scan: state.scan.key, encoder: state.encoder.key, layer: layerShown, otherCohorts: element("other-cohorts").checked };
  try {
    const answer = await ask("api/neighbours", body);
    if (answer.outside) {
      say("near-note", answer.outside);
      return;
    }
    say("near-note", `Most like slice at z ${layerShown} (CLS token, last block), of ${answer.searched.toLocaleString("en")} slices, one per subject.`);
    const cards = answer.neighbours.map(neighbourCard);
    element("near-list").replaceChildren(...cards.map((card) => card.item));
    for (const card of cards) await card.fill();
  } catch (error) {
    say("near-note", "The search failed.");
    tell(error);
  } finally {
    element("find-near").disabled = false;
  }
}

function neighbourCard(row) {
  const item = document.createElement("li");
  const button = Object.assign(document.createElement("button"), { type: "button", disabled: row.key === null });
  const picture = Object.assign(document.createElement("span"), { className: "picture", textContent: row.key === null ? "file not given" : "…" });
  const number = Object.assign(document.createElement("b"), { textContent: signed(row.similarity, 3) });
  const texts = [nameOf(row), kindOf(row)].map((text) => Object.assign(document.createElement("small"), { textContent: text, title: text }));
  button.append(picture, number, ...texts);
  button.setAttribute("aria-label", `${nameOf(row)}, ${kindOf(row)}, slice ${row.slice}, similarity ${row.similarity.toFixed(3)}${row.key ? ", open" : ""}`);
  button.addEventListener("click", () => openScan(row.key, { layerOfSlice: row.slice }));
  item.append(button);
  const fill = async () => {
    if (row.key === null || !item.isConnected) return;
    try {
      const png = await ask(`api/thumbnails/${row.key}/${row.slice}`);
      const image = Object.assign(new Image(), { alt: "", src: URL.createObjectURL(new Blob([png], { type: "image/png" })) });
      picture.replaceChildren(image);
    } catch (error) {
      picture.textContent = "cannot be read";
      picture.title = error.message;
    }
  };
  return { item, fill };
}

// ---- saving ----

// What is shown, with the words and the scale that it needs to be understood without the page.
function savePicture() {
  if (!state.scan) return;
  drawNow();
  const source = element("canvas");
  const unit = source.width / source.clientWidth;
  const strip = Math.round(78 * unit);
  const sheet = Object.assign(document.createElement("canvas"), { width: source.width, height: source.height + strip });
  const pen = sheet.getContext("2d");
  pen.fillStyle = "#0b0d10";
  pen.fillRect(0, 0, sheet.width, sheet.height);
  pen.drawImage(source, 0, 0);
  pen.fillStyle = "#e4e8ec";
  pen.font = `${13 * unit}px system-ui, sans-serif`;
  const lines = [`${nameOf(state.scan)}   ${kindOf(state.scan)}`, `crosshair at voxel ${state.crosshair.join(", ")} (RAS+); the patient's right is on the left`];
  const left = sheet.width - 230 * unit;
  if (state.map?.values) {
    const { slice, referenceSlice, voxel, block } = state.map;
    lines.push(`${state.encoder.name}, block ${block}, slice ${slice}: cosine similarity to voxel ${voxel.join(", ")}${slice === referenceSlice ? "" : ` on slice ${referenceSlice}`}`);
    const [width, top] = [210 * unit, source.height + 18 * unit];
    const colours = pen.createLinearGradient(left, 0, left + width, 0);
    SIMILARITY_COLOURS.forEach((colour, index) => colours.addColorStop(index / 10, `rgb(${colour.join(" ")})`));
    pen.save();
    pen.fillStyle = colours;
    pen.fillRect(left, top, width, 12 * unit);
    pen.fillStyle = "#c5ccd3";
    pen.textAlign = "center";
    ["−1", "0", "1"].forEach((tick, index) => pen.fillText(tick, left + (width * index) / 2, top + 28 * unit));
    pen.restore();
  }
  lines.forEach((line, index) => pen.fillText(line, 12 * unit, source.height + (22 + 20 * index) * unit, left - 28 * unit));
  sheet.toBlob((blob) => {
    const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: `${nameOf(state.scan).replace(/[^\w-]+/g, "_")}.png` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }, "image/png");
}

// ---- the list of scans ----

const MAX_LISTED = 300;

function listScans() {
  const words = element("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const { scans } = state.scene;
  const found = scans.filter((row) => {
    const text = `${nameOf(row)} ${kindOf(row)}`.toLowerCase();
    return words.every((word) => text.includes(word));
  });
  const listed = found.slice(0, MAX_LISTED);
  say("scan-count", found.length > MAX_LISTED ? `${found.length} of ${scans.length}, the first ${MAX_LISTED} are listed` : `${found.length} of ${scans.length}`);
  element("scan-list").replaceChildren(...listed.map((row) => {
    const item = document.createElement("li");
    const button = Object.assign(document.createElement("button"), { type: "button" });
    button.dataset.key = row.key;
    button.setAttribute("aria-current", row.key === state.scan?.key);
    button.append(nameOf(row), Object.assign(document.createElement("small"), { textContent: kindOf(row) }));
    button.addEventListener("click", () => openScan(row.key));
    item.append(button);
    return item;
  }));
}

function toggleScans(open = element("scans").hidden) {
  show("scans", open);
  element("open-scans").setAttribute("aria-expanded", open);
  if (open) element("filter").focus();
}

// ---- mouse and keys ----

function listen() {
  const canvas = element("canvas");
  const inPlane = (event) => {
    const { left, top } = canvas.getBoundingClientRect();
    return nv.inRenderTile(nv.uiData.dpr * (event.clientX - left), nv.uiData.dpr * (event.clientY - top)) < 0;
  };
  // Before NiiVue hears of it: it moves the crosshair while the button is held.
  canvas.addEventListener("pointerdown", (event) => { state.pressing = event.button === 0 && inPlane(event); }, true);
  window.addEventListener("pointerup", () => {
    if (state.pressing && state.scan) setReference(state.crosshair);
    state.pressing = false;
  });
  element("layer").addEventListener("input", () => {
    if (state.crosshair) moveTo([state.crosshair[0], state.crosshair[1], Number(element("layer").value)]);
  });
  element("encoder").addEventListener("change", () => chooseEncoder(state.scene.encoders.find((each) => each.key === element("encoder").value)));
  element("draw-smooth").addEventListener("click", () => chooseDrawing(true));
  element("draw-patches").addEventListener("click", () => chooseDrawing(false));
  element("find-near").addEventListener("click", findNeighbours);
  element("other-cohorts").addEventListener("change", () => { if (element("near-list").children.length) findNeighbours(); });
  element("toggle-render").addEventListener("click", toggleRender);
  element("save-picture").addEventListener("click", savePicture);
  element("open-keys").addEventListener("click", () => element("keys").showModal());
  element("open-scans").addEventListener("click", () => toggleScans());
  element("filter").addEventListener("input", listScans);
  element("close-error").addEventListener("click", () => show("error", false));
  window.addEventListener("keydown", onKey, true);
  window.addEventListener("keyup", (event) => { if (event.target === canvas) event.stopPropagation(); }, true);
}

function showRender(on) {
  state.render = on;
  state.slowPictures = 0;
  element("toggle-render").setAttribute("aria-pressed", on);
  arrange();
}

function toggleRender() {
  state.renderChosen = true;
  show("render-note", false);
  showRender(!state.render);
}

function toggleLayer(name) {
  const box = element(`on-${name}`);
  if (box) box.click();
}

const stepBlock = (step) => { if (state.encoder) chooseBlock(state.block + step); };

const KEYS = {
  ArrowUp: (event) => moveBy(0, 0, event.shiftKey ? 5 : 1),
  ArrowDown: (event) => moveBy(0, 0, event.shiftKey ? -5 : -1),
  ArrowLeft: () => stepBlock(-1),
  ArrowRight: () => stepBlock(1),
  w: () => moveBy(0, 1, 0),
  s: () => moveBy(0, -1, 0),
  a: () => moveBy(1, 0, 0), // the picture's left is the patient's right
  d: () => moveBy(-1, 0, 0),
  Enter: () => { if (state.crosshair) setReference(state.crosshair); },
  e: () => {
    const { encoders } = state.scene;
    if (encoders.length > 1) chooseEncoder(encoders[(encoders.indexOf(state.encoder) + 1) % encoders.length]);
  },
  m: () => toggleLayer("similarity"),
  b: () => toggleLayer("mask"),
  g: () => toggleLayer("segmentation"),
  n: findNeighbours,
  r: toggleRender,
  p: savePicture,
  "?": () => element("keys").showModal(),
};

function onKey(event) {
  const onCanvas = event.target === element("canvas");
  if (onCanvas) event.stopPropagation(); // NiiVue has keys of its own, which would do something else
  if (event.ctrlKey || event.metaKey || event.altKey || element("keys").open || !state.scene) return;
  // Fields and buttons keep the keys they live by.
  if (event.target.matches("input[type=search], select")) return;
  if (event.target.matches("input, button, a") && /^(Arrow|Enter$)/.test(event.key)) return;
  const digit = /^[0-9]$/.test(event.key);
  const action = digit ? () => { if (state.encoder) chooseBlock(Number(event.key)); } : KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action) return;
  event.preventDefault();
  action(event);
}

// ---- start ----

async function start() {
  listen();
  colourOfBar();
  try {
    state.token = takeToken();
    state.scene = await ask("api/scene");
    await nv.attachToCanvas(element("canvas"));
    arrange();
  } catch (error) {
    document.body.dataset.state = "failed";
    cover("Nothing is shown");
    tell(error);
    return;
  }
  const { scans, encoders } = state.scene;
  element("encoder").replaceChildren(...encoders.map(({ key, name }) => new Option(name, key)));
  show("no-encoder", !encoders.length);
  show("map-controls", encoders.length);
  if (encoders.length) chooseEncoder(encoders[0]);
  show("open-scans", scans.length > 1);
  if (scans.length > 1) {
    say("open-scans", `Scans (${scans.length})`);
    listScans();
  }
  if (scans[0].key === "given" || scans.length === 1) await openScan(scans[0].key);
  else {
    cover("Choose a scan from the list");
    document.body.dataset.state = "choosing";
    toggleScans(true);
  }
}

start();
