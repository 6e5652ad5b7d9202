// The page: a worklist, a picture or three planes of a volume, tools, and what a person decides.
import * as api from "./api.js";
import { Picture, colourOf, stroke } from "./canvas.js";
import { openGallery, openHistory, sure, thumbnail } from "./gallery.js";

const $ = (id) => document.getElementById(id);
const TOOLS = [
  ["click", "Click", "c"], ["outside", "Outside", "o"], ["box", "Box", "b"],
  ["scribble", "Scribble", "s"], ["brush", "Brush", "d"], ["eraser", "Eraser", "e"],
];
const PROMPTS = new Set(["click", "outside", "box", "scribble"]);

const picture = new Picture($("picture"));
let server = null;
let draft = null;        // what the server says of the open image
let axis = 0, index = 0; // the slice that is shown
let active = null;       // the structure that tools are about
let tool = "click";
let order = "newest";
let planes = [];         // the other two of a volume
let accepted = new Set();
let range = [0, 1];

const say = (text) => { $("status").textContent = text; $("error").textContent = ""; };
const complain = (error) => {
  $("error").textContent = error.message;
  $("status").textContent = "";
  if (error.status === 401) enter();
  if (error.status === 410) { draft = null; refresh(); }
};

// One thing at a time: what a person does while the server works waits for it.
let last = Promise.resolve();
function act(what) {
  last = last.then(async () => {
    document.body.setAttribute("aria-busy", "true");
    try { await what(); } catch (error) { complain(error); }
    document.body.removeAttribute("aria-busy");
  });
  return last;
}

// Entering

function enter() {
  api.forget();
  $("enter").hidden = false;
  $("annotate").hidden = $("library").hidden = $("history").hidden = true;
  $("token").focus();
}

async function begin() {
  server = await api.get("server");
  $("enter").hidden = true;
  $("who").textContent = `${server.user}; ${server.exemplars} exemplars`;
  $("notice").hidden = !server.notice;
  $("notice").textContent = server.notice;
  $("order-newest").parentElement.hidden = !server.worklist;
  view("annotate");
  await listImages();
}

function view(name) {
  for (const each of ["annotate", "library", "history"]) {
    $(each).hidden = each !== name;
    $(`view-${each}`).setAttribute("aria-pressed", String(each === name));
  }
  if (name === "library") act(openGallery);
  if (name === "history") act(openHistory);
}

// Images

async function listImages() {
  const list = $("worklist");
  if (!server.worklist) {
    list.textContent = "This server has no folder of images (--folder). Viewers can send theirs.";
    return;
  }
  const { images } = await api.get(`worklist?order=${order}`);
  list.replaceChildren(...images.map((image) => {
    const item = document.createElement("li");
    const button = document.createElement("button");
    button.textContent = image.name;
    button.dataset.mark = image.mark;
    button.disabled = Boolean(image.trouble);
    const note = document.createElement("small");
    note.textContent = image.trouble || [
      image.state === "new" ? "" : image.state,
      image.teaches === null ? "" : `spares ${(image.teaches * 100).toFixed(0)} % of the way`,
    ].filter(Boolean).join(", ");
    button.append(note);
    if (draft && draft.mark === image.mark) button.setAttribute("aria-current", "true");
    button.onclick = () => act(() => open(image.mark));
    item.append(button);
    return item;
  }));
}

async function leave() {
  if (!draft) return true;
  const worked = Object.values(draft.structures).some((one) => one.corrected.length);
  if (worked && !draft.accepted.length && !(await sure("Leave this image? What was not accepted is lost."))) return false;
  const former = draft.draft;
  draft = null;
  await api.remove(`drafts/${former}`).catch(() => {});
  return true;
}

async function open(mark) {
  if (!(await leave())) return;
  say("Opening…");
  const opened = await api.post("drafts", { mark });
  draft = { ...opened, mark };
  axis = draft.axis;
  index = Math.floor(draft.planes[axis].slices / 2);
  accepted = new Set();
  picture.cross = null;
  $("picture-title").textContent = draft.name;
  makePlanes();
  await loadSlice(true);
  say(`${draft.name} is open.`);
  const small = draft.shape[draft.axis] <= 1;
  if (small) await propose();
  refresh();
  await listImages();
  $("picture").focus();
}

async function next() {
  const { image } = await api.get(`next?order=${order}`);
  if (image) await open(image.mark);
  else say("There is no image left that nobody has looked at.");
}

// Slices and masks

async function loadSlice(fresh = false) {
  const plane = draft.planes[axis];
  index = Math.max(0, Math.min(plane.slices - 1, index));
  const slice = await api.slice(draft.draft, axis, index);
  const stretch = plane.spacing ? plane.spacing[0] / plane.spacing[1] : 1;
  picture.show(slice, stretch);
  if (fresh) setWindow(slice);
  await loadMasks();
  $("slices").hidden = plane.slices < 2;
  $("slice").max = plane.slices - 1;
  $("slice").value = index;
  $("slice-number").value = `${index + 1} of ${plane.slices}, ${plane.plane}`;
  await loadPlanes();
}

async function loadMasks() {
  picture.masks = await api.masks(draft.draft, axis, index);
  picture.render();
}

function setWindow(slice) {
  const values = Float32Array.from(slice.pixels).sort();
  const at = (share) => values[Math.min(values.length - 1, Math.floor(share * values.length))];
  let [low, high] = [at(0.005), at(0.995)];
  if (draft.window) [low, high] = [draft.window[0] - draft.window[1] / 2, draft.window[0] + draft.window[1] / 2];
  if (high <= low) [low, high] = [values[0], values.at(-1) + 1];
  range = [Math.min(values[0], low), Math.max(values.at(-1), high)];
  Object.assign(picture.aspect, { low, high });
  [$("level").min, $("level").max] = range;
  [$("width").min, $("width").max] = [0, range[1] - range[0]];
  $("level").value = (low + high) / 2;
  $("width").value = high - low;
}

function window_() {
  const [level, width] = [Number($("level").value), Number($("width").value)];
  Object.assign(picture.aspect, { low: level - width / 2, high: level + width / 2, opacity: Number($("opacity").value) });
  for (const each of [picture, ...planes]) {
    Object.assign(each.aspect, picture.aspect);
    if (each.slice) each.render();
  }
}

// The other two planes of a volume, through the cross.

function makePlanes() {
  planes = Object.keys(draft.planes).map(Number).filter((each) => each !== axis).map((each) => {
    const canvas = document.createElement("canvas");
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "button");
    canvas.setAttribute("aria-label", `${draft.planes[each].plane} plane: show it large`);
    const one = new Picture(canvas);
    one.axis = each;
    one.colour = picture.colour;
    const swap = () => act(async () => {
      index = voxel()[each];
      axis = each;
      picture.cross = null;
      makePlanes();
      await loadSlice();
      refresh();
    });
    canvas.onclick = swap;
    canvas.onkeydown = (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); swap(); } };
    return one;
  });
  $("planes").replaceChildren(...planes.map((one) => one.canvas));
}

// The voxel under the cross.
function voxel() {
  const plane = draft.planes[axis];
  const at = [0, 0, 0];
  at[axis] = index;
  const [x, y] = picture.cross;
  at[plane.columns_axis] = plane.flip_columns ? plane.columns - 1 - x : x;
  at[plane.rows_axis] = plane.flip_rows ? plane.rows - 1 - y : y;
  return at;
}

async function loadPlanes() {
  const at = voxel();
  for (const one of planes) {
    const plane = draft.planes[one.axis];
    const [slice, masks] = await Promise.all([
      api.slice(draft.draft, one.axis, at[one.axis]), api.masks(draft.draft, one.axis, at[one.axis]),
    ]);
    const [x, y] = [at[plane.columns_axis], at[plane.rows_axis]];
    one.masks = masks;
    one.show(slice, plane.spacing ? plane.spacing[0] / plane.spacing[1] : 1);
    one.cross = [plane.flip_columns ? plane.columns - 1 - x : x, plane.flip_rows ? plane.rows - 1 - y : y];
    Object.assign(one.aspect, picture.aspect);
    one.render();
  }
}

// What is done

const at = (path) => `drafts/${draft.draft}/${path}`;
const place = () => ({ axis, index });

function target() {
  if (!draft) throw new Error("Open an image first.");
  if (!active) throw new Error("Add a structure first: type its name, and Add.");
  return active;
}

async function update() {
  draft = { ...draft, ...(await api.get(`drafts/${draft.draft}`)) };
  await loadMasks();
  await loadPlanes();
  refresh();
}

async function watched(path, body) {
  const watching = setInterval(async () => {
    const { progress } = await api.get(at("progress")).catch(() => ({}));
    $("progress").hidden = !progress;
    if (progress) [$("progress").value, $("progress").max] = progress;
  }, 400);
  $("cancel").hidden = false;
  try { return await api.post(at(path), body); } finally {
    clearInterval(watching);
    $("cancel").hidden = $("progress").hidden = true;
  }
}

async function propose() {
  say("Proposing…");
  const { proposed } = await watched("propose");
  await update();
  if (!proposed) return say("The library is empty: draw what there is, and accept it.");
  const found = Object.entries(draft.structures).filter(([, one]) => one.pixels).map(([name]) => name);
  for (const name of found) accepted.add(name);
  refresh();
  const flag = draft.proposals[index]?.flag;
  say(`Proposed: ${found.join(", ") || "nothing was found"}${flag ? ` (quality ${flag})` : ""}.`);
}

async function correct(kind, points, inside) {
  const structure = target();
  await api.post(at("correct"), { structure, kind, points, inside, ...place() });
  accepted.add(structure);
  await update();
  say(`${structure}: ${draft.structures[structure].pixels} pixels.`);
}

async function paint(points, value) {
  const structure = target();
  const one = stroke(points, Number($("brush").value), picture.slice);
  const bits = api.packed(one.mask, one.width, one.height);
  await api.post(at("paint"), { structure, ...place(), x: one.x, y: one.y, width: one.width, height: one.height, bits, value });
  accepted.add(structure);
  await update();
  say(`${structure}: ${draft.structures[structure].pixels} pixels.`);
}

async function undo() {
  target();
  const { structure } = await api.post(at("undo"));
  await update();
  say(structure ? `Taken back: ${structure}.` : "There is nothing to take back.");
}

async function accept() {
  const names = [...accepted].filter((name) => draft?.structures[name]);
  if (!names.length) throw new Error("Tick what is right: a structure that is ticked and has no pixel is recorded as absent.");
  const absent = names.filter((name) => !draft.structures[name].pixels);
  const { exemplars, library } = await api.post(at("accept"), { structures: names.filter((n) => !absent.includes(n)), absent });
  server = await api.get("server");
  $("who").textContent = `${server.user}; ${library} exemplars`;
  await update();
  await listImages();
  say(`Accepted as ${exemplars.length === 1 ? "an exemplar" : `${exemplars.length} exemplars`}; the library has ${library}.`);
}

async function reject() {
  target();
  const reason = await sure("Put this image aside? Nothing of it goes to the library.", true);
  if (reason === false) return;
  await api.post(at("reject"), { reason });
  await listImages();
  say("Put aside.");
}

// Structures and what is known of them

picture.colour = (name) => colourOf(Object.keys(draft?.structures ?? {}).indexOf(name));

function refresh() {
  const names = Object.keys(draft?.structures ?? {});
  if (!names.includes(active)) active = names[0] ?? null;
  const proposal = draft?.proposals[draft && axis === draft.axis ? index : -1];
  $("structures").replaceChildren(...names.map((name, i) => {
    const one = draft.structures[name];
    const item = document.createElement("li");
    item.classList.toggle("active", name === active);
    const swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = colourOf(i);
    const pick = document.createElement("button");
    pick.className = "pick";
    pick.textContent = name;
    pick.setAttribute("aria-pressed", String(name === active));
    pick.title = `${name}: work on it (${i + 1})`;
    pick.onclick = () => { active = name; refresh(); };
    const tick = document.createElement("input");
    tick.type = "checkbox";
    tick.checked = accepted.has(name);
    tick.setAttribute("aria-label", `${name} is right, and is accepted`);
    tick.onchange = () => { tick.checked ? accepted.add(name) : accepted.delete(name); };
    const note = document.createElement("small");
    const score = proposal?.scores[name];
    const reasons = proposal?.reasons[name] ?? [];
    const steps = Object.entries(one.counts).map(([what, count]) => `${count} ${what}`).join(", ");
    const flag = reasons.length ? "suspect" : (proposal && score ? proposal.flag : "");
    note.textContent = [
      `${one.pixels} px`, score?.present ? `IoU ${score.iou.toFixed(2)}` : score ? "absent" : "",
      flag, reasons.join("; "), steps,
    ].filter(Boolean).join(", ");
    if (flag) note.classList.add(flag);
    item.append(swatch, pick, tick, note);
    return item;
  }));
  for (const id of ["propose", "accept", "reject", "export", "reset", "spread"]) $(id).disabled = !draft;
  $("undo").disabled = !draft?.can_undo;
  showRecalled(proposal);
  for (const button of $("tools").children) {
    const name = button.dataset.tool;
    button.setAttribute("aria-checked", String(name === tool));
    button.disabled = PROMPTS.has(name) && server && !server.corrects;
  }
  if (!draft) {
    picture.slice = null;
    picture.draw();
    $("picture-title").textContent = "No image is open";
  }
}

let shown = "";
async function showRecalled(proposal) {
  const found = proposal?.recalled[active] ?? [];
  const wanted = found.map((one) => one.key).join("\n");
  if (wanted === shown) return;
  shown = wanted;
  $("recalled").replaceChildren(...found.slice(0, 9).map((one) => thumbnail(
    one.key, `${one.absent ? "lacks it, " : ""}distance ${one.distance.toFixed(3)}`)));
}

// Pointer and keys

function choose(name) {
  tool = name;
  picture.shape = null;
  refresh();
  picture.draw();
  say(`Tool: ${TOOLS.find(([each]) => each === name)[1]}.`);
}

const isBrush = () => tool === "brush" || tool === "eraser";
function begun(point) {
  picture.shape = {
    kind: tool === "box" ? "box" : "line", points: [point, point],
    colour: active ? picture.colour(active) : "#fff", radius: isBrush() ? Number($("brush").value) : 0,
  };
}

function finish() {
  const points = picture.shape?.points ?? [];
  picture.shape = null;
  picture.draw();
  if (points.length < 2) return;
  if (tool === "box") act(() => correct("box", [points[0], points.at(-1)], true));
  else if (tool === "scribble") act(() => correct("scribble", points, !shifted));
  else if (isBrush()) act(() => paint(points, tool === "brush"));
}

let shifted = false;
$("picture").onpointerdown = (event) => {
  const point = picture.pixel(event);
  if (!point || event.button) return;
  picture.cross = point;
  shifted = event.shiftKey;
  if (tool === "click" || tool === "outside") {
    picture.draw();
    const inside = tool === "click" && !shifted;
    act(() => correct("click", [point], inside));
    return;
  }
  $("picture").setPointerCapture(event.pointerId);
  begun(point);
  picture.draw();
};
$("picture").onpointermove = (event) => {
  const point = picture.shape && !picture.shape.keys && picture.pixel(event);
  if (!point) return;
  picture.shape.points.push(point);
  picture.cross = point;
  picture.draw();
};
$("picture").onpointerup = () => { if (picture.shape && !picture.shape.keys) finish(); };
$("picture").onwheel = (event) => {
  if (!draft || draft.planes[axis].slices < 2) return;
  event.preventDefault();
  act(() => move(Math.sign(event.deltaY)));
};

async function move(step) {
  index += step;
  await loadSlice();
  refresh();
}

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
$("picture").onkeydown = (event) => {
  if (!draft || !picture.cross) return;
  const step = MOVES[event.key];
  if (step) {
    event.preventDefault();
    const far = event.shiftKey ? 10 : 1;
    const { width, height } = picture.slice;
    picture.cross = [
      Math.max(0, Math.min(width - 1, picture.cross[0] + step[0] * far)),
      Math.max(0, Math.min(height - 1, picture.cross[1] + step[1] * far)),
    ];
    if (picture.shape) picture.shape.points[picture.shape.kind === "box" ? 1 : picture.shape.points.length - 1] = picture.cross;
    picture.draw();
    const [x, y] = picture.cross;
    const here = [...picture.masks].filter(([, mask]) => mask[y * picture.slice.width + x]).map(([name]) => name);
    $("status").textContent = `${x}, ${y}${here.length ? `: ${here.join(", ")}` : ""}`;
  } else if (event.key === "Enter") {
    event.preventDefault();
    const point = picture.cross;
    if (tool === "click" || tool === "outside") act(() => correct("click", [point], tool === "click"));
    else if (isBrush()) act(() => paint([point], tool === "brush"));
    else if (!picture.shape) { shifted = false; begun(point); picture.shape.keys = true; picture.draw(); say("Go on with the arrow keys, then Enter."); }
    else if (tool === "box") finish();
    else { picture.shape.points.push(point); say("A point more; Escape ends it."); }
  } else if (event.key === "Escape" && picture.shape) {
    tool === "scribble" ? finish() : (picture.shape = null, picture.draw());
  }
};

document.addEventListener("keydown", (event) => {
  if ($("annotate").hidden || event.altKey || event.metaKey || document.querySelector("dialog[open]")) return;
  if (/^(INPUT|TEXTAREA)$/.test(event.target.tagName) && event.target.type !== "range") return;
  if (event.ctrlKey) { if (event.key === "z") { event.preventDefault(); act(undo); } return; }
  const key = event.key.toLowerCase();
  const chosen = TOOLS.find(([, , letter]) => letter === key);
  const names = Object.keys(draft?.structures ?? {});
  if (chosen && !(PROMPTS.has(chosen[0]) && !server?.corrects)) choose(chosen[0]);
  else if (/^[1-9]$/.test(key) && names[key - 1]) { active = names[key - 1]; refresh(); say(`Structure: ${active}.`); }
  else if (key === "," && draft) act(() => move(-1));
  else if (key === "." && draft) act(() => move(1));
  else if (key === "p" && draft) act(propose);
  else if (key === "u" && draft) act(undo);
  else if (key === "a" && draft) act(accept);
  else if (key === "r" && draft) act(reject);
  else if (key === "n" && server?.worklist) act(next);
  else return;
  event.preventDefault();
});

$("tools").replaceChildren(...TOOLS.map(([name, label, key]) => {
  const button = document.createElement("button");
  button.textContent = label;
  button.dataset.tool = name;
  button.setAttribute("role", "radio");
  button.title = `${label} (${key.toUpperCase()})`;
  button.onclick = () => choose(name);
  return button;
}));
for (const name of ["annotate", "library", "history"]) $(`view-${name}`).onclick = () => view(name);
for (const name of ["newest", "teaching"])
  $(`order-${name}`).onclick = () => act(async () => {
    order = name;
    for (const each of ["newest", "teaching"]) $(`order-${each}`).setAttribute("aria-pressed", String(each === name));
    await listImages();
  });
for (const [id, what] of Object.entries({ propose, undo, accept, reject })) $(id).onclick = () => act(what);
$("reset").onclick = () => act(async () => { await api.post(at("reset"), { structure: target() }); await update(); say("Cleared."); });
$("export").onclick = () => act(() => api.download(at("export")));
$("spread").onclick = () => act(async () => { say("Spreading…"); await watched("spread", { structure: target() }); await update(); say("Spread."); });
$("cancel").onclick = () => api.post(at("cancel")).catch(complain);
$("slice").onchange = () => act(() => move(Number($("slice").value) - index));
for (const id of ["level", "width", "opacity"]) $(id).oninput = window_;
$("window-reset").onclick = () => { if (picture.slice) { setWindow(picture.slice); window_(); } };
$("add").onsubmit = (event) => {
  event.preventDefault();
  const name = $("name").value.trim();
  if (!name || !draft) return complain(new Error(draft ? "Type a name first." : "Open an image first."));
  draft.structures[name] ??= { known: false, pixels: 0, counts: {}, corrected: [] };
  active = name;
  $("name").value = "";
  refresh();
  $("picture").focus();
};
$("enter").onsubmit = (event) => {
  event.preventDefault();
  api.setToken($("token").value.trim());
  act(begin);
};
setInterval(() => { if (draft) api.post(`drafts/${draft.draft}/heartbeat`).catch(complain); }, 20000);
addEventListener("beforeunload", (event) => {
  if (draft && !draft.accepted.length && Object.values(draft.structures).some((one) => one.corrected.length)) event.preventDefault();
});

refresh();
if (api.hasToken()) act(begin); else enter();
