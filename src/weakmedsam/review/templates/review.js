// The page: cases, what is shown of one, clicks and decisions.

// How the border of a layer is drawn.
const DASHES = { original: [1, 3], mask: [2, 4], prediction: [8, 5], label: [] };

const $ = (id) => document.getElementById(id);
const state = {
  cases: [], now: null, volumes: {}, at: { x: 0, y: 0, z: 0 }, chosen: 0, shown: new Set(["label"]), hidden: false, busy: false,
};

async function ask(path, body) {
  const options = body === undefined ? {} : { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("the server does not answer. Start `weakmedsam review` again; this page then goes on");
  }
  if (!answer.ok) {
    const text = await answer.text();
    let told = text;
    try { told = JSON.parse(text).problem; } catch { /* plain text */ }
    throw new Error(told);
  }
  return answer;
}

function say(text, problem = false) {
  $("said").textContent = text;
  $("said").classList.toggle("problem", problem);
}

async function guarded(work) {
  try { await work(); } catch (error) { say(error.message, true); }
}

const urlOf = (part) => `/cases/${encodeURIComponent(state.now.name)}/${part}`;

async function load(layer) {
  const name = state.now.name;
  const answer = await ask(urlOf(`${layer}.raw`));
  const volume = new Volume(await answer.arrayBuffer(), answer.headers.get("X-Shape").split(",").map(Number));
  if (state.now.name === name) state.volumes[layer] = volume;
}

async function open(name) {
  say("loading …");
  state.now = await (await ask(`/cases/${encodeURIComponent(name)}`)).json();
  state.volumes = {};
  history.replaceState(null, "", `#${encodeURIComponent(name)}`);
  await Promise.all(["image", "label"].map(load));
  const { size, order } = state.now;
  state.at = { x: size >> 1, y: size >> 1, z: order.length ? order[0] : state.now.slices >> 1 };
  chooseClass(firstPresent());
  say("");
  list();
  draw();
  await Promise.all([...state.shown].filter((layer) => state.now.layers.includes(layer) && !state.volumes[layer]).map(load));
  draw();
}

function firstPresent() {
  const has = state.now.present[state.at.z];
  return has[state.chosen] ? state.chosen : Math.max(0, has.indexOf(1));
}

function chooseClass(number) {
  state.chosen = number;
  for (const button of $("classes").children) button.setAttribute("aria-checked", String(button.dataset.class === CLASSES[number]));
}

// Drawing

function draw() {
  if (!state.now || !state.volumes.image) return;
  for (const kind of ["slice", "rows", "columns"]) drawPlane($(kind), kind);
  for (const button of $("layers").children) {
    button.disabled = !state.now.layers.includes(button.dataset.layer);
    button.setAttribute("aria-pressed", String(state.shown.has(button.dataset.layer) && !button.disabled));
  }
  const { present, decision, rejected, states, slices } = state.now, z = state.at.z;
  const has = CLASSES.filter((_, c) => present[z][c]).join(", ") || "no class";
  const word = ["", "changed by a neighbour's click", "trusted", "left out of training"][states[z]];
  $("where").textContent = `${state.now.name} · slice ${z} of 0–${slices - 1} · labelled: ${has}${word ? " · " + word : ""}`;
  $("accept").setAttribute("aria-pressed", String(decision === "accepted"));
  $("reject").setAttribute("aria-pressed", String(decision === "rejected"));
  $("leave").setAttribute("aria-pressed", String(rejected.includes(z)));
  $("undo").disabled = !state.now.clicks;
  strip();
}

function drawPlane(canvas, kind) {
  const { image, label, original, prediction, mask, cam } = state.volumes;
  const plane = planeOf(kind, image.shape, state.at, state.now.up), layers = { label, prediction, mask, original };
  const picture = new ImageData(plane.width, plane.height), pixels = picture.data;
  const scale = 65.535, share = $("opacity").value / 100;
  drawImage(pixels, plane, image, $("low").value * scale, $("high").value * scale);
  if (!state.hidden) {
    if (cam && state.shown.has("cam")) drawActivation(pixels, plane, cam, image.shape[1], state.chosen, share);
    if (label && state.shown.has("label")) fillClasses(pixels, plane, label, share);
  }
  const { pen, frame, ratio } = place(canvas, kind, picture);
  if (!state.hidden)
    for (const [layer, dash] of Object.entries(DASHES))
      if (layers[layer] && state.shown.has(layer)) outlineClasses(pen, frame, plane, layers[layer], dash, ratio);
  if (kind === "slice" && !state.hidden) drawClicks(pen, frame, ratio);
  drawLines(pen, frame, kind, plane);
}

// Put a plane into its canvas, in its true proportions.
function place(canvas, kind, picture) {
  const ratio = window.devicePixelRatio || 1, box = canvas.getBoundingClientRect();
  canvas.width = Math.max(1, Math.round(box.width * ratio));
  canvas.height = Math.max(1, Math.round(box.height * ratio));
  const [dz, dy, dx] = state.now.spacing;
  const wide = picture.width * (kind === "columns" ? dy : dx), high = picture.height * (kind === "slice" ? dy : dz);
  const factor = Math.min(canvas.width / wide, canvas.height / high);
  const frame = { width: wide * factor, height: high * factor };
  frame.left = (canvas.width - frame.width) / 2;
  frame.top = (canvas.height - frame.height) / 2;
  Object.assign(frame, { stepX: frame.width / picture.width, stepY: frame.height / picture.height });
  canvas.frame = frame;
  const small = new OffscreenCanvas(picture.width, picture.height);
  small.getContext("2d").putImageData(picture, 0, 0);
  const pen = canvas.getContext("2d");
  pen.imageSmoothingEnabled = false;
  pen.drawImage(small, frame.left, frame.top, frame.width, frame.height);
  return { pen, frame, ratio };
}

// Where the other planes are: marks at the slice's borders, a line in the others.
function drawLines(pen, frame, kind, plane) {
  const { x, y, z } = state.at, reach = kind === "slice" ? 12 : Infinity;
  const across = kind === "columns" ? y : x, down = kind === "slice" ? y : state.now.up ? plane.height - 1 - z : z;
  const atX = frame.left + (across + 0.5) * frame.stepX, atY = frame.top + (down + 0.5) * frame.stepY;
  const { left, top, width, height } = frame, wide = Math.min(reach, width), high = Math.min(reach, height);
  pen.strokeStyle = "rgba(125, 183, 245, .8)";
  pen.beginPath();
  for (const from of [left, left + width - wide]) { pen.moveTo(from, atY); pen.lineTo(from + wide, atY); }
  if (kind === "slice") for (const from of [top, top + height - high]) { pen.moveTo(atX, from); pen.lineTo(atX, from + high); }
  pen.stroke();
}

function drawClicks(pen, frame, ratio) {
  pen.font = `bold ${13 * ratio}px sans-serif`;
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  for (const [z, x, y, sign, name] of state.now.points) {
    if (z !== state.at.z) continue;
    const at = [frame.left + (x + 0.5) * frame.stepX, frame.top + (y + 0.5) * frame.stepY];
    pen.beginPath();
    pen.arc(...at, 8 * ratio, 0, 7);
    pen.fillStyle = "rgba(10, 14, 18, .8)";
    pen.fill();
    pen.lineWidth = 2 * ratio;
    pen.strokeStyle = COLOURS[CLASSES.indexOf(name) % COLOURS.length];
    pen.stroke();
    pen.fillStyle = "#fff";
    pen.fillText(sign > 0 ? "+" : "−", ...at);
  }
}

function strip() {
  const { slices, unsure, states } = state.now, box = $("strip");
  if (box.childElementCount !== slices) {
    box.replaceChildren(...Array.from({ length: slices }, (_, z) => {
      const bar = document.createElement("span");
      bar.append(document.createElement("b"));
      bar.addEventListener("click", () => move({ z }));
      return bar;
    }));
  }
  [...box.children].forEach((bar, z) => {
    const known = unsure[z] !== null;
    bar.className = [["", "changed", "trusted", "left_out"][states[z]], known ? "" : "none", z === state.at.z ? "here" : ""].join(" ");
    bar.style.setProperty("--u", states[z] > 1 ? 1 : known ? Math.max(0.06, unsure[z]) : 0);
    bar.title = `slice ${z}${known ? `, unsure ${unsure[z].toFixed(2)}` : ", no class"}`;
  });
}

function list() {
  const box = $("cases");
  if (box.childElementCount !== state.cases.length)
    box.replaceChildren(...state.cases.map(({ name }) => {
      const item = document.createElement("li"), button = document.createElement("button");
      for (const part of ["name", "mark", "bar"]) button.append(Object.assign(document.createElement("span"), { className: part }));
      button.addEventListener("click", () => guarded(() => open(name)));
      item.append(button);
      return item;
    }));
  const most = Math.max(...state.cases.map(({ unsure }) => unsure), 1e-6);
  state.cases.forEach((held, i) => {
    const button = box.children[i].firstChild, [name, mark, bar] = button.children;
    const chosen = state.now && state.now.name === held.name;
    button.classList.toggle("chosen", chosen);
    name.textContent = held.name;
    mark.className = `mark ${held.decision || ""}`;
    mark.textContent = { accepted: "✓ accepted", rejected: "✗ rejected" }[held.decision] || (held.clicks ? `${held.clicks} click${held.clicks > 1 ? "s" : ""}` : "");
    bar.style.setProperty("--share", `${(100 * held.unsure) / most}%`);
    button.title = `unsure ${held.unsure.toFixed(3)}`;
    if (chosen) button.scrollIntoView({ block: "nearest" });
  });
  const done = state.cases.filter(({ decision }) => decision).length;
  $("progress").textContent = `${done} of ${state.cases.length} cases decided`;
}

// What the user does

function move(to) {
  const { slices, size } = state.now;
  Object.assign(state.at, to);
  state.at.z = Math.min(slices - 1, Math.max(0, state.at.z));
  for (const axis of ["x", "y"]) state.at[axis] = Math.min(size - 1, Math.max(0, state.at[axis]));
  if (!state.now.present[state.at.z][state.chosen]) chooseClass(firstPresent());
  draw();
}

// The label's slices come as run lengths.
function take(told) {
  const { values, shape } = state.volumes.label, area = shape[1] * shape[2];
  for (const [z, runs] of Object.entries(told.slices))
    for (let i = 0, at = z * area; i < runs.length; at += runs[i + 1], i += 2) values.fill(runs[i], at, at + runs[i + 1]);
  const { slices, ...standing } = told;
  Object.assign(state.now, standing);
  Object.assign(state.cases.find(({ name }) => name === state.now.name), { clicks: told.clicks, decision: told.decision });
  list();
  draw();
}

async function change(action, body, done) {
  if (state.busy || !state.now) return;
  state.busy = true;
  await guarded(async () => {
    const before = performance.now();
    take(await (await ask(urlOf(action), body)).json());
    say(done(Math.round(performance.now() - before), state.now));
  });
  state.busy = false;
}

function click(event, sign) {
  const { x, y } = pixelAt($("slice"), event), name = CLASSES[state.chosen], z = state.at.z;
  if (x < 0) return;
  Object.assign(state.at, { x, y });
  change("click", { slice: z, x, y, sign, class: name }, (ms) => `${sign > 0 ? "included in" : "excluded from"} ${name}, saved · ${ms} ms`);
}

function pixelAt(canvas, event) {
  const box = canvas.getBoundingClientRect(), ratio = canvas.width / box.width, frame = canvas.frame;
  if (!frame) return { x: -1, y: -1 };
  const x = Math.floor(((event.clientX - box.left) * ratio - frame.left) / frame.stepX);
  const y = Math.floor(((event.clientY - box.top) * ratio - frame.top) / frame.stepY);
  const inside = x >= 0 && y >= 0 && x * frame.stepX < frame.width && y * frame.stepY < frame.height;
  return inside ? { x, y } : { x: -1, y: -1 };
}

const decide = (slice, decision, word) => change("decide", { slice, decision }, () => (decision ? word : "taken back"));
const decideCase = (decision, word) => decide(null, state.now.decision === decision ? null : decision, word);

async function toggle(layer) {
  if (!state.now || !state.now.layers.includes(layer)) return;
  if (!state.shown.delete(layer)) state.shown.add(layer);
  draw();
  if (state.shown.has(layer) && !state.volumes[layer]) {
    say("asking the network …");
    await load(layer);
    say("");
  }
  draw();
}

function step(by) {
  const at = state.cases.findIndex(({ name }) => name === state.now.name) + by;
  if (state.cases[at]) guarded(() => open(state.cases[at].name));
  else say(by > 0 ? "that was the last case" : "this is the first case");
}

// From the slice that is shown on, the least sure first, round and round; those that are decided are passed over.
function nextUnsure() {
  const { order, states } = state.now, from = order.indexOf(state.at.z) + 1;
  const found = [...order.slice(from), ...order.slice(0, from)].find((z) => states[z] < 2 && z !== state.at.z);
  if (found === undefined) say("no other slice is left to look at");
  else move({ z: found });
}

const ACTS = {
  undo: () => change("undo", {}, () => "click taken back"),
  accept: () => decideCase("accepted", "accepted: all slices are trusted"),
  reject: () => decideCase("rejected", "rejected: left out of training"),
  leave: () => decide(state.at.z, state.now.rejected.includes(state.at.z) ? null : "rejected", "slice left out of training"),
  unsure: nextUnsure,
  next: () => step(1),
};
const KEYS = {
  z: ACTS.undo, a: ACTS.accept, r: ACTS.reject, x: ACTS.leave, u: ACTS.unsure, n: ACTS.next, b: () => step(-1),
  ArrowDown: () => move({ z: state.at.z + 1 }), ArrowUp: () => move({ z: state.at.z - 1 }),
  " ": () => { state.hidden = !state.hidden; draw(); },
};
for (const button of $("layers").children) KEYS[button.querySelector("kbd").textContent.toLowerCase()] = () => guarded(() => toggle(button.dataset.layer));

function listen() {
  for (const [id, act] of Object.entries(ACTS)) $(id).addEventListener("click", act);
  for (const button of $("layers").children) button.addEventListener("click", () => guarded(() => toggle(button.dataset.layer)));
  [...$("classes").children].forEach((button, c) => button.addEventListener("click", () => { chooseClass(c); draw(); }));
  for (const id of ["low", "high", "opacity"]) $(id).addEventListener("input", draw);
  $("slice").addEventListener("click", (event) => {
    const { x, y } = pixelAt($("slice"), event);
    if (event.altKey && x >= 0) move({ x, y });
    else click(event, event.shiftKey ? -1 : 1);
  });
  $("slice").addEventListener("contextmenu", (event) => { event.preventDefault(); click(event, -1); });
  for (const kind of ["rows", "columns"])
    $(kind).addEventListener("click", (event) => {
      const { x, y } = pixelAt($(kind), event);
      const z = state.now.up ? state.now.slices - 1 - y : y;
      if (x >= 0) move(kind === "rows" ? { x, z } : { y: x, z });
    });
  $("views").addEventListener("wheel", (event) => { event.preventDefault(); move({ z: state.at.z + Math.sign(event.deltaY) }); }, { passive: false });
  window.addEventListener("resize", draw);
  window.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !state.now || event.target.type === "range") return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key, number = Number(key) - 1;
    if (!KEYS[key] && !(number in CLASSES)) return;
    event.preventDefault();
    if (KEYS[key]) KEYS[key]();
    else { chooseClass(number); draw(); }
  });
}

guarded(async () => {
  listen();
  state.cases = await (await ask("/cases")).json();
  list();
  const asked = decodeURIComponent(location.hash.slice(1)), names = state.cases.map(({ name }) => name);
  const first = state.cases.find(({ decision }) => !decision) || state.cases[0];
  await open(names.includes(asked) ? asked : first.name);
});
