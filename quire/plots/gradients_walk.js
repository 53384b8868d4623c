// The page of gradients: its graph as SVG, the walk through it, the curves, buttons and keys.
"use strict";

// ---- the drawing ----

function rounded(points) {
  const kept = points.filter(([x, y], i) => !i || Math.abs(x - points[i - 1][0]) + Math.abs(y - points[i - 1][1]) > 0.5);
  let path = `M${kept[0]}`;
  for (let i = 1; i < kept.length; i++) {
    const [x, y] = kept[i], [px, py] = kept[i - 1], next = kept[i + 1];
    if (!next) { path += `L${x},${y}`; break; }
    const before = Math.hypot(x - px, y - py), after = Math.hypot(next[0] - x, next[1] - y), r = Math.min(8, before / 2, after / 2);
    path += `L${x - (x - px) / before * r},${y - (y - py) / before * r}Q${x},${y},${x + (next[0] - x) / after * r},${y + (next[1] - y) / after * r}`;
  }
  return path;
}
function render() {
  const focused = $("graph").contains(document.activeElement), svg = $("graph");
  layout();
  const wide = page.L + page.R, high = page.h;
  svg.replaceChildren();
  svg.setAttribute("width", wide); svg.setAttribute("height", high); svg.setAttribute("viewBox", `0 0 ${wide} ${high}`);
  const defs = draw("defs", {}, svg);
  for (const kind of ["head", "head-f", "head-b"]) {
    const marker = draw("marker", { id: kind, viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 8, markerHeight: 8, markerUnits: "userSpaceOnUse", orient: "auto-start-reverse" }, defs);
    draw("path", { d: "M0,0.5L8,4L0,7.5Z" }, marker);
  }
  const hatch = draw("pattern", { id: "hatch", width: 8, height: 8, patternUnits: "userSpaceOnUse" }, defs);
  draw("rect", { width: 8, height: 8 }, hatch);
  draw("path", { d: "M-1,9L9,-1M-1,1L1,-1M7,9L9,7" }, hatch);
  segments = [];
  page.X = page.L; page.Y = 0;
  inside(page, svg);
  if (focused) now.item.drawn?.focus({ preventScroll: true });
  mark();
}
function inside(box, svg) {
  for (const [link, points] of box.paths) {
    const drawn = draw("path", { d: rounded(points.map(([x, y]) => [x + box.X, y + box.Y])), class: `edge${link.to.kind === "out" ? "" : " head"}${link.from.kind === "in" ? "" : " tail"}` }, svg);
    segments.push({ drawn, edges: link.edges });
  }
  for (const item of box.children) {
    item.X = box.X + item.x; item.Y = box.Y + item.y;
    ({ call: drawCall, sum: drawPoint, join: drawPoint, end: drawEnd })[item.kind](item, svg);
    if (item.open) inside(item, svg);
  }
}
function drawCall(call, svg) {
  const left = call.X - call.L, wide = call.L + call.R, group = draw("g", { role: "treeitem", tabindex: -1, transform: `translate(${left},${call.Y})`, "aria-level": ancestors(call).length, "data-number": call.number }, svg);
  const most = call.children.length > 0, label = `${call.name || call.layer}, ${call.layer}, ${{ agrees: "gradient agrees", wrong: "gradient wrong", within: "a gradient within is wrong" }[call.verdict] || call.verdict}`;
  call.drawn = group;
  call.look = `call ${call.wrongness}${call.open ? " open" : ""}`;
  group.setAttribute("aria-label", label);
  if (most) group.setAttribute("aria-expanded", call.open);
  draw("title", {}, group, label);
  if (most && !call.open) draw("rect", { class: "under", x: 4, y: 4, width: wide, height: call.h, rx: 7 }, group);
  draw("rect", { class: "shape", width: wide, height: call.h, rx: 7 }, group);
  if (call.open) draw("path", { class: "heading", d: `M1,${HEADING}V8Q1,1,8,1H${wide - 8}Q${wide - 1},1,${wide - 1},8V${HEADING}Z` }, group);
  const tall = call.open ? HEADING : call.h;
  draw("rect", { class: "passed f", x: 4, y: 6, width: 3, height: tall - 12, rx: 1.5 }, group);
  draw("rect", { class: "passed b", x: wide - 7, y: 6, width: 3, height: tall - 12, rx: 1.5 }, group);
  const start = most ? 30 : 14;
  if (call.open) {
    const name = fitted(call.short, "600 13px", MOST);
    draw("text", { x: start, y: 18.5 }, group, name);
    draw("text", { class: "class", x: start + 8 + width(name, "600 13px"), y: 18.5 }, group, described(call));
  } else {
    draw("text", { x: start, y: 18 }, group, fitted(call.short, "600 13px", wide - start - 26));
    draw("text", { class: "class", x: start, y: 33 }, group, fitted(described(call), `${call.verdict === "wrong" ? 700 : 400} 11.5px`, wide - start - 10));
  }
  const [x, y] = [wide - 18, call.open ? 14 : 13];
  if (call.wrongness === "wrong" || call.wrongness === "within") draw("path", { class: "badge", d: `M${x - 3.5},${y - 8}h7l4.5,4.5v7l-4.5,4.5h-7l-4.5,-4.5v-7Z` }, group);
  draw("text", { class: "sign", x, y: y + 4 }, group, { agrees: "✓", wrong: "✕", within: "!" }[call.wrongness] || "–");
  if (most) {
    const toggle = draw("g", { class: "toggle" }, group);
    draw("rect", { x: 8, y: tall / 2 - 12, width: 20, height: 24 }, toggle);
    draw("path", { d: call.open ? `M14,${tall / 2 - 2}l4,4l4,-4` : `M16,${tall / 2 - 4}l4,4l-4,4` }, toggle);
    toggle.onclick = (event) => { event.stopPropagation(); toggleBox(call); };
    group.ondblclick = (event) => { event.stopPropagation(); toggleBox(call); };
  }
  draw("rect", { class: "ring", x: -4, y: -4, width: wide + 8, height: tall + 8, rx: 10 }, group);
  group.onclick = (event) => { if (event.detail < 2) go(call, now.back); };
}
function drawPoint(point, svg) {
  const group = draw("g", { class: "point", transform: `translate(${point.X},${point.Y + 11})` }, svg), sum = point.kind === "sum";
  draw("title", {}, group, sum ? "A sum: backward, each of its terms receives the gradient as it is" : `Put together by ${point.parent.layer} itself`);
  draw("circle", { r: 11 }, group);
  draw("path", { d: sum ? "M-5,0H5M0,-5V5" : "M-4,-4L4,4M4,-4L-4,4" }, group);
}
function drawEnd(end, svg) {
  const group = draw("g", { class: "end", transform: `translate(${end.X - end.L},${end.Y})` }, svg);
  draw("rect", { width: end.L + end.R, height: end.h, rx: end.h / 2 }, group);
  draw("text", { x: 15, y: 19.5 }, group, end.name);
  group.onclick = () => walk(end === tokens ? 0 : steps.length);
  end.drawn = group;
}

// ---- the walk ----

const now = { item: null, back: false };
let steps = [];  // the calls that are seen and not open, in forward order; the walk goes down them, then up again
const place = () => { const i = steps.indexOf(now.item); return i < 0 ? -1 : now.back ? 2 * steps.length - 1 - i : i; };
function go(item, back, quick) {
  Object.assign(now, { item, back });
  mark();
  reveal(item, quick);
  if ($("graph").contains(document.activeElement)) item.drawn.focus({ preventScroll: true });
}
function walk(step, quick) {
  const n = steps.length, i = Math.max(0, Math.min(2 * n - 1, step));
  if (n) go(steps[i < n ? i : 2 * n - 1 - i], i >= n, quick);
}
function move(by, quick) {
  const i = place();
  if (i >= 0) return walk(i + by, quick);
  const within = steps.filter((step) => step.from >= now.item.from && step.to <= now.item.to);  // of an open box: in at one end, or before it
  const edge = steps.indexOf(now.back ? within[within.length - 1] : within[0]);
  walk((now.back ? 2 * steps.length - 1 - edge : edge) + (by > 0 ? 0 : -1), quick);
}
function settle() { steps = calls.filter((call) => !call.open && !hidden(call)); }
function toggleBox(box) {
  if (!box.children.length) return;
  box.open = !box.open;
  if (now.item !== box && ancestors(now.item).includes(box)) now.item = box;
  settle();
  render();
  reveal(now.item);
}
function openAll(open) {
  for (const call of calls) call.open = call.children.length > 0 && (open || call.parent === page);
  now.item = shown(now.item);
  settle();
  render();
  reveal(now.item, true);
}
let lastWrong = -1;
function toWrong() {
  const wrong = calls.filter((call) => call.verdict === "wrong");
  if (!wrong.length) return;
  const call = wrong[lastWrong = (lastWrong + 1) % wrong.length];
  for (const box of ancestors(call)) box.open = true;
  Object.assign(now, { item: call, back: true });
  settle();
  render();
  reveal(call, false, true);
  call.drawn.focus({ preventScroll: true });
}
function reveal(item, quick, middle) {
  const frame = $("frame"), margin = middle ? frame.clientHeight / 2 - 40 : 70, svg = $("graph"), offset = Math.max(0, (frame.clientWidth - svg.clientWidth) / 2);
  const high = item.open ? HEADING : item.h, near = (at, from, to, room, edge) => from - edge < at ? from - edge : to + edge > at + room ? Math.min(from - edge, to + edge - room) : at;
  frame.scrollTo({
    left: near(frame.scrollLeft, offset + item.X - item.L, offset + item.X + item.R, frame.clientWidth, 10),
    top: near(frame.scrollTop, item.Y, item.Y + high, frame.clientHeight, margin),
    behavior: quick || calm.matches ? "auto" : "smooth",
  });
}
function mark() {
  const { item, back } = now, inNow = (order) => order >= item.from && order <= item.to;
  for (const call of calls) {
    if (hidden(call)) continue;
    const went = back || call.to < item.from || call === item, came = back && (call.from > item.to || call === item);
    const looks = `${call.look}${went ? " went" : ""}${came ? " came" : ""}${call === item ? ` now${back ? " back" : ""}` : ""}`;
    if (call.drawn.getAttribute("class") === looks) continue;
    call.drawn.setAttribute("class", looks);
    call.drawn.setAttribute("tabindex", call === item ? 0 : -1);
    call.drawn.setAttribute("aria-selected", call === item);
  }
  loss.drawn.setAttribute("class", `end${back ? " lit" : ""}`);
  for (const { drawn, edges: carried } of segments) {
    let went = false, came = false, flows = false;
    for (const edge of carried) {
      const first = edge.to.kind === "call" ? edge.to.from : edge.to.order, start = edge.from.kind === "call" ? edge.from.to : edge.from.order;
      const touches = (one) => one === item || (one.kind === "call" && ancestors(one).includes(item));
      if (back) {
        came ||= first >= item.from && !(isPoint(edge.to) && first < item.to);
        flows ||= first > item.to && touches(edge.from);
      } else {
        went ||= first <= item.from || touches(edge.to) && !touches(edge.from);
        flows ||= touches(edge.to) && !touches(edge.from);
      }
    }
    drawn.classList.toggle("went", went || back && !came);
    drawn.classList.toggle("came", came);
    drawn.classList.toggle("flows", flows && (went || came));
  }
  $("forward").setAttribute("aria-pressed", !back);
  $("backward").setAttribute("aria-pressed", back);
  const step = place();
  $("said").textContent = step < 0 ? `${back ? "Backward" : "Forward"}: an open box` : `Step ${step + 1} of ${2 * steps.length}, ${back ? "backward" : "forward"}`;
  $("spoken").textContent = `${$("said").textContent}: ${item.drawn.getAttribute("aria-label")}`;
  $("first").disabled = $("previous").disabled = step === 0;
  $("last").disabled = $("next").disabled = step === 2 * steps.length - 1;
  tell(item);
  here();
}

// ---- the curves ----

let scale;
function curves() {
  const svg = $("curves"), wide = svg.clientWidth, high = svg.clientHeight, left = 34, bottom = high - 8, top = 10;
  const logs = (name) => leaves.map((leaf) => typeof leaf[name] === "number" && leaf[name] > 0 ? Math.log10(leaf[name]) : null);
  const lines = { a: logs("activation_norm"), g: logs("gradient_norm") }, all = [...lines.a, ...lines.g].filter((v) => v !== null);
  const low = all.length ? Math.floor(Math.min(...all)) : 0, peak = all.length ? Math.max(low + 1, Math.ceil(Math.max(...all))) : 1;
  const x = (i) => left + 6 + (wide - left - 12) * (leaves.length > 1 ? i / (leaves.length - 1) : 0.5), y = (v) => bottom - (bottom - top) * (v - low) / (peak - low);
  svg.replaceChildren();
  draw("rect", { class: "here", id: "here", y: top - 6, height: bottom - top + 10, rx: 2 }, svg);
  const every = Math.ceil((peak - low) / 4);
  for (let v = low; v <= peak; v += every) {
    draw("line", { class: "grid", x1: left, x2: wide, y1: y(v), y2: y(v) }, svg);
    draw("text", { x: left - 5, y: y(v) + 3.5, "text-anchor": "end" }, svg, v >= 0 && v < 4 ? String(10 ** v) : `1e${v}`);
  }
  for (const name of ["a", "g"]) {
    let path = "", pen = "M";
    lines[name].forEach((v, i) => { if (v === null) pen = "M"; else { path += `${pen}${x(i).toFixed(1)},${y(v).toFixed(1)}`; pen = "L"; } });
    draw("path", { class: name, d: path || "M0,0", ...(name === "g" ? { "stroke-dasharray": "5 2" } : {}) }, svg);
  }
  leaves.forEach((leaf, i) => { if (leaf.verdict === "wrong") draw("path", { class: "bad", d: `M${x(i) - 4},${top - 7}l8,8m0,-8l-8,8` }, svg); });
  scale = { x, left, wide };
  here();
}
function here() {
  const from = scale.x(now.item.from) - 2.5, to = scale.x(now.item.to) + 2.5;
  $("here").setAttribute("x", from);
  $("here").setAttribute("width", to - from);
}
$("curves").onclick = (event) => {
  const share = (event.offsetX - scale.left - 6) / (scale.wide - scale.left - 12);
  go(shown(leaves[Math.max(0, Math.min(leaves.length - 1, Math.round(share * (leaves.length - 1))))]), now.back);
};

// ---- buttons and keys ----

const actions = {
  first: () => walk(0), previous: () => move(-1), next: () => move(1), last: () => walk(2 * steps.length - 1),
  forward: () => go(now.item, false), backward: () => go(now.item, true), open: () => openAll(true), close: () => openAll(false), wrong: toWrong,
};
for (const name in actions) $(name).onclick = actions[name];
const KEYS = { ArrowLeft: "previous", ArrowRight: "next", Home: "first", End: "last", f: "forward", b: "backward", w: "wrong" };
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const own = event.target.closest("button, pre, canvas"), key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key === "Enter" || key === " ") {
    if (own || event.target.closest("#panel")) return;
    event.preventDefault();
    toggleBox(now.item);
  } else if (KEYS[key] && !event.target.closest("pre")) {
    event.preventDefault();
    if (event.repeat && KEYS[key] === "next") move(1, true);
    else if (event.repeat && KEYS[key] === "previous") move(-1, true);
    else actions[KEYS[key]]();
  }
});

// ---- begin ----

function begin() {
  for (const token of data.tokens) make("span", token, "token", $("tokens")).dir = "auto";
  const wrong = calls.filter((call) => call.verdict === "wrong").length, agree = calls.filter((call) => call.verdict === "agrees").length;
  $("summary").textContent = `loss ${number(data.loss)} · ${calls.length} calls of layers`;
  $("wrong").hidden = !wrong;
  if (wrong > 1) $("wrong").firstChild.textContent = `✕ Go to the ${wrong} wrong layers `;
  $("all-agree").hidden = wrong > 0 || !agree;
  $("all-agree").textContent = agree === calls.length ? `✓ all ${agree} gradients agree` : `✓ ${agree} of ${calls.length} gradients agree`;
  // Open what fits on the screen, a level at a time; the model itself in any case.
  for (let level = 1; ; level++) {
    const boxes = calls.filter((call) => call.children.length && ancestors(call).length === level);
    for (const box of boxes) box.open = true;
    if (!boxes.length) break;
    layout();
    if (level > 1 && (page.h > $("frame").clientHeight || page.L + page.R > $("frame").clientWidth)) { for (const box of boxes) box.open = false; break; }
  }
  settle();
  now.item = steps[0];
  curves();
  render();
  $("frame").scrollLeft = Math.max(0, (page.L + page.R - $("frame").clientWidth) / 2);
  document.body.dataset.ready = "yes";
}
dark.onchange = () => { told = null; tell(now.item); };
addEventListener("resize", curves);
begin();
