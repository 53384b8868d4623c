// What the page of gradients shows, and where it stands: the calls as a graph, laid out in rows.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const dark = matchMedia("(prefers-color-scheme: dark)"), calm = matchMedia("(prefers-reduced-motion: reduce)");
const make = (kind, text, className, inside) => {
  const made = document.createElement(kind);
  if (text !== undefined && text !== null) made.textContent = text;
  if (className) made.className = className;
  if (inside) inside.append(made);
  return made;
};
const draw = (kind, attributes, inside, text) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const name in attributes) made.setAttribute(name, attributes[name]);
  if (text !== undefined) made.textContent = text;
  if (inside) inside.append(made);
  return made;
};
const number = (value) => {  // a number, text for what JSON cannot hold, or null
  if (value === null) return "–";
  if (typeof value === "string") return { inf: "∞", "-inf": "−∞" }[value] || "not a number";
  const size = Math.abs(value);
  if (size === 0 || (size >= 0.001 && size < 100000)) return String(Number(value.toPrecision(4)));
  const [digits, power] = value.toExponential(1).split("e");
  return `${digits} × 10${[...String(Number(power))].map((c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]).join("")}`;
};

// ---- what there is: calls in calls, and between them the sums that a stream runs through ----

const page = { id: "page", kind: "page", open: true, parent: null, children: [] };
const tokens = { id: "tokens", kind: "end", name: `${data.tokens.length} token${data.tokens.length === 1 ? "" : "s"}`, parent: page, children: [], reads: [], order: -1 };
const loss = { id: "loss", kind: "end", name: `loss ${number(data.loss)}`, parent: page, children: [], reads: [], order: Infinity };
const calls = data.nodes.map((node) => ({ ...node, id: node.number, kind: "call", open: false, children: [], reads: [] })).sort((a, b) => a.number - b.number);
const called = new Map(calls.map((call) => [call.number, call]));
const isPoint = (item) => item.kind === "sum" || item.kind === "join";
const ancestors = (item) => { const all = []; for (let box = item.parent; box; box = box.parent) all.push(box); return all; };
for (const call of calls) {
  call.parent = called.get(call.parent) || page;
  call.parent.children.push(call);
  for (const part of ["equation", "derivation", "forward_code", "backward_code"]) call[part] = data.texts[call[part]];
  call.wrongness = ["agrees", "wrong", "within"].includes(call.verdict) ? call.verdict : "other";
}
const leaves = calls.filter((call) => !call.children.length);
leaves.forEach((leaf, order) => {
  leaf.order = order;
  for (const item of [leaf, ...ancestors(leaf)]) { item.from = Math.min(item.from ?? order, order); item.to = order; }
});
for (const call of calls) {
  call.order = call.from;
  const outer = call.parent.name;
  call.short = !call.name ? "model" : outer && call.name.startsWith(outer + ".") ? call.name.slice(outer.length + 1) : call.name;
}
function meet(set, kind, place, box, reads) {
  const point = { id: kind + place, kind, parent: box, children: [], reads, order: Math.max(...set.sources.map((one) => one.to)) + 0.5 };
  box.children.push(point);
  set.inputs = [point];
}
function join(set, place) {
  // What was read by a box, and by what it calls, leaves that box together: its own arithmetic put it together.
  const newest = set.sources.reduce((a, b) => a.to > b.to ? a : b);
  const box = ancestors(newest).find((outer) => outer.kind === "call" && !set.readers.some((reader) => ancestors(reader).includes(outer))
    && set.sources.some((one) => outer.sources.includes(one.number) && !ancestors(one).includes(outer)));
  if (box) meet(set, "join", place, box, set.sources);
}
function sums() {
  // A call that reads a, b and c where another read a and b reads the sum of that and c: the stream of a residual model.
  const sets = new Map();
  for (const leaf of leaves) {
    const sources = [...new Set(leaf.sources)].map((n) => called.get(n)).filter((call) => call && call !== leaf && call.to < leaf.order);
    const key = sources.map((call) => call.number).sort((a, b) => a - b).join();
    if (!sets.has(key)) sets.set(key, { sources, readers: [], inputs: sources });
    sets.get(key).readers.push(leaf);
  }
  const bySize = [...sets.values()].filter((set) => set.sources.length).sort((a, b) => a.sources.length - b.sources.length);
  bySize.forEach((set, place) => {
    const base = bySize.slice(0, place).reverse().find((other) => other.sources.length < set.sources.length && other.sources.every((one) => set.sources.includes(one)));
    if (!base) return join(set, place);
    const added = set.sources.filter((one) => !base.sources.includes(one)), newest = added.reduce((a, b) => a.to > b.to ? a : b);
    const box = ancestors(newest).find((outer) => outer === page || base.readers.some((reader) => ancestors(reader).includes(outer)));
    meet(set, "sum", place, box, [...base.inputs, ...added]);
  });
  for (const set of sets.values()) for (const reader of set.readers) reader.reads = set.inputs.length ? set.inputs : [tokens];
}
sums();
loss.reads = leaves.length ? [leaves[leaves.length - 1]] : [tokens];
page.children.push(tokens, loss);
for (const item of [page, ...calls]) item.children.sort((a, b) => a.order - b.order);
const everything = [tokens, ...calls, ...[page, ...calls].flatMap((box) => box.children.filter(isPoint)), loss];

// ---- where things stand: rows from top to bottom, a box around what a call calls ----

const LEAF = 42, HEADING = 28, ROW = 24, BESIDE = 14, INSIDE = 13, LANE = 12, MOST = 300;
const pen = document.createElement("canvas").getContext("2d"), FACE = 'system-ui, "DejaVu Sans", sans-serif', measured = new Map();
function width(text, font) {
  const key = font + text;
  if (!measured.has(key)) { pen.font = `${font} ${FACE}`; measured.set(key, pen.measureText(text).width); }
  return measured.get(key);
}
function fitted(text, font, most) {
  if (width(text, font) <= most) return text;
  const letters = [...text];
  while (letters.length > 1 && width(letters.join("") + "…", font) > most) letters.pop();
  return letters.join("") + "…";
}
const shown = (item) => { let seen = item; for (const box of ancestors(item)) if (!box.open) seen = box; return seen; };
const hidden = (item) => shown(item) !== item;
const described = (call) => ({ wrong: `WRONG · ${call.layer}`, within: `wrong inside · ${call.layer}`, agrees: call.layer })[call.verdict] || call.verdict;

let edges, segments;
function connect() {
  edges = new Map();
  for (const item of everything) for (const source of item.reads) {
    const from = shown(source), to = shown(item);
    if (from !== to) edges.set(`${from.id}>${to.id}`, { from, to, first: Math.min(item.order, edges.get(`${from.id}>${to.id}`)?.first ?? Infinity) });
  }
  for (const box of [page, ...calls]) { box.ports = new Map(); box.links = new Map(); }
  const port = (box, side, source) => {
    const key = side + source.id;
    if (!box.ports.has(key)) box.ports.set(key, { id: `${box.id}.${key}`, kind: side, source, order: source.order, L: 0, R: 0, h: 0 });
    return box.ports.get(key);
  };
  const link = (box, from, to, edge, out, into) => {
    const key = `${from.id}>${to.id}>${out?.id}>${into?.id}`;
    if (!box.links.has(key)) box.links.set(key, { from, to, out, into, edges: [] });
    box.links.get(key).edges.push(edge);
  };
  for (const edge of edges.values()) {
    const up = ancestors(edge.from), down = ancestors(edge.to), meet = up.find((box) => down.includes(box));
    let from = edge.from, out, box = meet, into;
    for (const inner of up.slice(0, up.indexOf(meet))) {
      const leave = port(inner, "out", edge.from);
      link(inner, from, leave, edge, out);
      [from, out] = [inner, leave];
    }
    for (const inner of down.slice(0, down.indexOf(meet)).reverse()) {
      into = port(inner, "in", edge.from);
      link(box, from, inner, edge, out, into);
      [box, from, out] = [inner, into, undefined];
    }
    link(box, from, edge.to, edge, out);
  }
}

function size(item) {
  if (isPoint(item)) return Object.assign(item, { L: 11, R: 11, h: 22 });
  if (item.kind === "end") { const half = (width(item.name, "600 13px") + 30) / 2; return Object.assign(item, { L: half, R: half, h: 30 }); }
  if (item.open) return arrange(item);
  const most = Math.max(width(item.short, "600 13px") + (item.children.length ? 62 : 42), width(described(item), `${item.verdict === "wrong" ? 700 : 400} 11.5px`) + (item.children.length ? 44 : 24));
  const half = Math.min(MOST, Math.max(96, most)) / 2;
  return Object.assign(item, { L: half, R: half, h: LEAF });
}
function apart(runs) {
  // Runs that share neither source nor target must not lie on each other: those of a gap that overlap get levels.
  for (const gap of new Set(runs.map((one) => one.gap))) {
    const groups = [];
    for (const one of runs.filter((other) => other.gap === gap)) {
      const kin = groups.filter((group) => group.some((other) => other.source === one.source || other.target === one.target));
      for (const group of kin) groups.splice(groups.indexOf(group), 1);
      groups.push([...kin.flat(), one]);
    }
    const levels = [], ends = (group) => group.flatMap((one) => [one.from[0], one.to[0]]);
    for (const group of groups) {
      const [low, high] = [Math.min(...ends(group)) - 4, Math.max(...ends(group)) + 4];
      let level = levels.findIndex((level) => level.every(([from, to]) => to < low || from > high));
      if (level < 0) level = levels.push([]) - 1;
      levels[level].push([low, high]);
      group.level = level;
    }
    const step = Math.min(7, 14 / levels.length);
    for (const group of groups) for (const { from, to } of group) for (const point of [from, to]) point[1] += (group.level - (levels.length - 1) / 2) * step;
  }
}
function arrange(box) {
  const links = [...box.links.values()], entries = [...box.ports.values()].filter((port) => port.kind === "in").sort((a, b) => a.order - b.order), exits = [...box.ports.values()].filter((port) => port.kind === "out");
  const into = new Map(), rows = [entries];
  for (const link of links) { if (!into.has(link.to)) into.set(link.to, []); into.get(link.to).push(link); }
  for (const port of entries) port.row = 0;
  for (const item of box.children) {
    size(item);
    item.row = 1 + Math.max(0, ...(into.get(item) || []).map((link) => link.from.row));
    (rows[item.row] = rows[item.row] || []).push(item);
  }
  if (exits.length) { for (const port of exits) port.row = rows.length; rows.push(exits); }

  // What reads one call, and is alone in reading it, stands right below it: both are given the wider one's room.
  const from = new Map();
  for (const link of links) from.set(link.from, (from.get(link.from) || 0) + 1);
  const room = (item, side) => Math.max(item[side], ...(item.column || []).map((other) => other[side]));
  for (const item of box.children) {
    const reads = into.get(item) || [], above = reads.length === 1 && from.get(reads[0].from) === 1 && reads[0].from.row === item.row - 1 ? reads[0].from : null;
    item.column = above?.column || [];
    item.column.push(item);
  }
  // Across: below what it reads from the row above; the neighbours of a row side by side.
  entries.forEach((port, i) => { port.x = (i - (entries.length - 1) / 2) * 26; });
  for (const row of rows.slice(1)) {
    for (const item of row) {
      const all = (into.get(item) || []).filter((link) => link.from.kind !== "in"), near = all.filter((link) => link.from.row === item.row - 1);
      const any = item.kind === "out" && exits.length === 1 ? [] : isPoint(item) && near.length ? near : all;
      item.x = any.length ? any.reduce((sum, link) => sum + link.from.x + (link.out?.x || 0), 0) / any.length : 0;
    }
    row.sort((a, b) => a.x - b.x || (a.order ?? 0) - (b.order ?? 0));
    const wanted = row.map((item) => item.x);
    row.forEach((item, i) => { if (i) item.x = Math.max(item.x, row[i - 1].x + room(row[i - 1], "R") + BESIDE + room(item, "L")); });
    const middle = (row.length - 1) / 2, fan = row.length % 2 === 1 && wanted.every((x) => x === wanted[0]);
    const shift = fan ? wanted[0] - row[middle].x : row.reduce((sum, item, i) => sum + wanted[i] - item.x, 0) / row.length;
    for (const item of row) item.x += shift;
    if (row.length === 1 && Math.abs(row[0].x) < 16) row[0].x = 0;  // no small jogs
  }
  // Down.
  let y = box === page ? -6 : HEADING;
  const tops = [y], bottoms = [y];
  rows.slice(1).forEach((row, i) => {
    tops[i + 1] = y += i || box === page ? ROW : ROW - 6;
    for (const item of row) item.y = y;
    bottoms[i + 1] = y += Math.max(...row.map((item) => item.h));
  });
  for (const port of entries) port.y = HEADING;
  // What passes other rows goes straight down where nothing stands in the way, else in a lane on the right.
  const lanes = [], runs = [];  // a run: two points that lie side by side in the gap above a row
  const run = (gap, from, to, link) => { if (Math.abs(from[0] - to[0]) > 1) runs.push({ gap, from, to, source: link.edges[0].from, target: link.into || link.to }); };
  let left = Infinity, right = -Infinity;
  for (const item of rows.flat()) { left = Math.min(left, item.x - item.L); right = Math.max(right, item.x + item.R); }
  box.paths = links.map((link) => {
    const x1 = link.from.x + (link.out?.x || 0), y1 = link.from.y + link.from.h, x2 = link.to.x + (link.into?.x || 0), y2 = link.to.y, a = link.from.row, b = link.to.row;
    const turn = tops[b] - ROW / 2;
    if (b - a <= 1) {
      const points = [[x1, y1], [x1, turn], [x2, turn], [x2, y2]];
      run(b, points[1], points[2], link);
      return [link, points];
    }
    const passed = rows.slice(a + 1, b).flat(), source = link.edges[0].from;
    const taken = (x) => lanes.some((lane) => lane.source !== source && Math.abs(lane.x - x) < LANE && lane.a < b && a < lane.b);
    const free = (x) => passed.every((item) => x < item.x - item.L - 7 || x > item.x + item.R + 7) && !taken(x);
    let x = [x1, x2].find(free);
    if (x === undefined) {
      x = Math.max(...passed.map((item) => item.x + item.R)) + INSIDE;
      while (taken(x)) x += LANE;
    }
    lanes.push({ x, a, b, source });
    left = Math.min(left, x); right = Math.max(right, x);
    const start = a === 0 && entries.includes(link.from) ? HEADING + (ROW - 6) / 2 : bottoms[a] + ROW / 2, middle = link.to.y + link.to.h / 2;
    const end = isPoint(link.to) && Math.abs(x - x2) > 20 ? [[x, middle], [x2 + (x > x2 ? 11 : -11), middle]] : [[x, turn], [x2, turn], [x2, y2]];
    const points = [[x1, y1], [x1, start], [x, start], ...end];
    run(a + 1, points[1], points[2], link);
    if (end.length === 3) run(b, points[3], points[4], link);
    return [link, points];
  });
  apart(runs);
  const head = box === page ? 0 : width(box.short, "600 13px") + width(described(box), "400 11.5px") + 92;
  box.L = Math.max(-left + INSIDE, head / 2); box.R = Math.max(right + INSIDE, head - box.L);
  box.h = y + (exits.length ? 0 : INSIDE);
  if (exits.length) for (const port of exits) port.y = box.h;
  return box;
}
function layout() {
  // Twice: only when all stands somewhere is it known which way what comes into a box lies, and so which entry it takes.
  const locate = (box) => { for (const item of box.children) { item.X = box.X + item.x; if (item.open) locate(item); } };
  connect();
  arrange(page);
  page.X = 0;
  locate(page);
  for (const box of calls) if (box.open && !hidden(box)) for (const port of box.ports.values()) port.order = port.source.X;
  arrange(page);
}
