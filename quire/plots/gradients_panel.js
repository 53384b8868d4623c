// The side panel of the page of gradients.
"use strict";

// ---- the panel: all that is known of one call ----

const MARKS = { agrees: "✓ agrees", wrong: "✕ WRONG", within: "! wrong inside" };
function row(table, name, value) {
  const made = table.insertRow();
  make("th", name, "", made).scope = "row";
  const cell = made.insertCell();
  if (typeof value === "string") cell.textContent = value; else cell.append(...value);
}
function chips(items) {
  return items.map((item) => {
    if (item.kind !== "call") return make("span", item.name, "chip plain");
    const chip = make("button", item.name || item.layer, "chip");
    chip.onclick = () => { for (const box of ancestors(item)) box.open = true; settle(); now.item = item; render(); reveal(item); };
    return chip;
  });
}
const stream = { kind: "end", name: "the sum before it", children: [], parent: null };
const behind = (item) => isPoint(item) ? item.reads.map((one) => isPoint(one) ? stream : one) : [item];
function reading(call) {  // what a call reads from outside, and what reads it: through sums, to the calls themselves
  const own = (item) => item === call || ancestors(item).includes(call), unique = (list) => [...new Set(list)].filter((item) => !own(item));
  const readers = (sources) => unique(leaves.filter((leaf) => sources.some((one) => leaf.reads.includes(one)) && !own(leaf)));
  const mine = everything.filter(own), outward = everything.filter((item) => isPoint(item) && item.reads.some((one) => own(one)));
  return [unique(mine.flatMap((item) => item.reads).flatMap(behind)), readers([...mine, ...outward])];
}
// Where one text alone is read, a row of a picture is a token of it; the last one may be foreseen only.
const oneText = leaves.filter((leaf) => leaf.layer === "Embedding" && leaf.reads.includes(tokens)).length === 1;
const bare = (comments) => comments.replace(/^\s*#\s?/gm, "");
let told;
function tell(call) {
  if (told === call) return;
  told = call;
  const panel = $("panel"), head = make("div", null, "head"), names = make("div", null, "", head);
  panel.replaceChildren(head);
  panel.scrollTop = 0;
  make("h2", call.layer, "", names);
  make("div", call.name || "the whole model", "path mono", names);
  make("span", MARKS[call.verdict] || call.verdict, `verdict ${call.wrongness}`, head);
  if (call.equation) call.equation.split("`").reduce((p, piece, i) => { p.append(i % 2 ? make("code", piece) : piece); return p; }, make("p", null, "equation", panel));
  if (call.derivation) make("p", bare(call.derivation).replace(/\n(?=\p{Ll})/gu, " "), "derivation mono", panel);  // sentences flow on
  const tiles = make("div", null, "tiles", panel);
  for (const [name, value] of [["norm of the activation", call.activation_norm], ["of the gradient that arrives", call.gradient_norm], ["of the gradient it returns", call.returned_norm]]) {
    const tile = make("div", null, "", tiles);
    make("b", number(value), "", tile);
    make("span", name, "", tile);
  }
  const facts = make("table", null, "facts", panel), judged = (value) => value === null ? ["not compared"] : [number(value), make("span", MARKS[call.verdict] || "", `judged ${call.wrongness}`)];
  row(facts, "Shape of the input", call.inputs || "–");
  row(facts, "Shape of the output", call.output || "–");
  row(facts, "Difference to autograd", judged(call.autograd_difference));
  row(facts, "Difference to finite differences", judged(call.numerical_difference));
  const [sources, readers] = reading(call);
  if (sources.length) row(facts, "Reads", chips(sources));
  if (readers.length) row(facts, "Is read by", chips(readers));
  if (call.parameters.length) {
    make("h3", "Parameters", "", panel);
    const table = make("table", null, "parameters", panel), heads = table.createTHead().insertRow();
    for (const name of ["name", "shape", "norm", "norm of its gradient"]) make("th", name, "", heads).scope = "col";
    const body = table.createTBody();
    for (const [name, shape, norm, grad] of call.parameters) {
      const made = body.insertRow();
      [name, shape, number(norm), number(grad)].forEach((text, i) => { made.insertCell().textContent = text; if (!i) made.cells[0].className = "mono"; });
    }
  }
  if (call.activation_picture || call.gradient_picture) {
    make("h3", "Positions (down) by channels (across)", "", panel);
    const maps = make("div", null, "maps", panel);
    heat(maps, "activation", call.activation_picture, call.output, false);
    heat(maps, "gradient", call.gradient_picture, call.output, true);
    make("p", "Point at a picture to read a value. Colours are the square root of the share of the largest.", "", panel).id = "told";
  }
  if (call.forward_code || call.backward_code) {
    make("h3", "The code", "", panel);
    const codes = make("div", null, "codes", panel);
    code(codes, "f", "↓ forward", call.forward_code, "");
    code(codes, "b", "↑ backward", call.backward_code, call.derivation);
  }
}
function palette(back) {
  const stops = dark.matches ? (back ? [[24, 30, 39], [120, 66, 22], [240, 150, 70], [255, 240, 200]] : [[24, 30, 39], [38, 88, 148], [110, 182, 244], [235, 246, 255]])
    : (back ? [[255, 253, 250], [247, 196, 144], [214, 105, 20], [92, 36, 0]] : [[250, 252, 255], [148, 192, 228], [40, 112, 184], [6, 34, 88]]);
  return Uint32Array.from({ length: 256 }, (_, i) => {
    const x = i / 255 * (stops.length - 1), k = Math.min(Math.floor(x), stops.length - 2);
    const [r, g, b] = stops[k].map((v, c) => Math.round(v + (stops[k + 1][c] - v) * (x - k)));
    return 0xff000000 | b << 16 | g << 8 | r;
  });
}
function heat(maps, name, picture, output, back) {
  if (!picture) return;
  const figure = make("figure", null, "", maps), caption = make("figcaption", null, "", figure), canvas = make("canvas", null, "", figure);
  const [rows, columns] = picture.size, last = (output.match(/\d+/g) || []).slice(-2).map(Number), bytes = Uint8Array.from(atob(picture.data), (c) => c.charCodeAt(0)), colours = palette(back);
  const size = last.length === 2 && last.every((n, i) => n >= picture.whole[i]) ? last : picture.whole;  // pictures may come pooled
  make("b", name, "", caption);
  caption.append(`, ${size.join(" × ")}, up to ${number(picture.largest)}`);
  canvas.width = columns; canvas.height = rows;
  canvas.style.height = `${Math.max(24, Math.min(220, rows * Math.max(6, Math.min(14, Math.round(170 / rows)))))}px`;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Heat map of the ${name}: ${size[0]} positions by ${size[1]} channels, largest ${number(picture.largest)}`);
  const context = canvas.getContext("2d"), image = context.createImageData(columns, rows), pixels = new Uint32Array(image.data.buffer);
  for (let i = 0; i < pixels.length; i++) pixels[i] = colours[bytes[i]];
  context.putImageData(image, 0, 0);
  canvas.onpointermove = (event) => {
    const r = Math.min(rows - 1, Math.max(0, Math.floor(event.offsetY / canvas.clientHeight * rows))), c = Math.min(columns - 1, Math.max(0, Math.floor(event.offsetX / canvas.clientWidth * columns)));
    const whole = (i, kept, all) => { const from = Math.floor(i * all / kept), to = Math.floor((i + 1) * all / kept) - 1; return to > from ? `${from} to ${to}` : `${from}`; };
    const token = oneText && (size[0] === data.tokens.length || size[0] === data.tokens.length - 1) && rows === size[0] ? ` (${data.tokens[r]})` : "", value = typeof picture.largest === "number" ? picture.largest * (bytes[r * columns + c] / 255) ** 2 : null;
    $("told").textContent = `${name}, position ${whole(r, rows, size[0])}${token}, channel ${whole(c, columns, size[1])}: about ${number(value === null ? null : Number(value.toPrecision(2)))}`;
  };
}
const WORDS = /(#[^\n]*)|("""[\s\S]*?"""|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')|\b(def|return|if|else|elif|for|in|is|not|and|or|None|True|False|with|assert|lambda|while|raise|import|from|self)\b/g;
function code(codes, side, name, text, derivation) {
  const part = make("div", null, side, codes);
  make("b", name, "", part);
  const lines = (text || "no code").replace(/\s+$/, "").split("\n"), indent = Math.min(...lines.filter((line) => line.trim()).map((line) => line.search(/\S/)));
  const plain = lines.map((line) => line.slice(indent)).join("\n"), pre = make("pre", null, "", part), derived = new Set(bare(derivation).split("\n").map((line) => line.trim()).filter(Boolean));
  pre.tabIndex = 0;
  const parts = [];  // [text, class], in order
  let at = 0;
  for (const found of plain.matchAll(WORDS)) {
    parts.push([plain.slice(at, found.index), ""], [found[0], found[1] ? "comment" : found[2] ? "string" : "word"]);
    at = found.index + found[0].length;
  }
  parts.push([plain.slice(at), ""]);
  const rows = plain.split("\n").map((line) => {  // what is too long for a line goes on under it, indented
    const made = make("div", null, /^\s*#/.test(line) && derived.has(bare(line).trim()) ? "derived" : "", pre), deep = Math.max(0, line.search(/\S/)) + 4;
    made.style.textIndent = `-${deep}ch`;
    made.style.paddingLeft = `calc(${deep}ch + 10px)`;
    return made;
  });
  let i = 0;
  for (const [text, kind] of parts) text.split("\n").forEach((piece, k) => {
    if (k) i++;
    if (piece) rows[i].append(kind ? make("span", piece, kind) : piece);
  });
}
