/* The data in the page (see packing.py), its texts, and small pieces of HTML. */
const byId = (id) => document.getElementById(id);
const root = document.documentElement;
const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
const isCoarse = matchMedia("(pointer: coarse)").matches;
let data;

/* A text in the page's language, with values filled into its {fields}. */
function t(text, values = {}) {
  const found = texts[text] || text;
  return found.replace(/\{(\w+)\}/g, (field, name) => (name in values ? values[name] : field));
}

async function inflate(id) {
  const packed = Uint8Array.from(atob(byId(id).textContent.trim()), (one) => one.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
function numbersOf(bytes) {
  const count = bytes.length / 4, whole = new Uint8Array(bytes.length);
  for (let plane = 0; plane < 4; plane++)
    for (let i = 0; i < count; i++) whole[4 * i + plane] = bytes[plane * count + i];
  return new Float32Array(whole.buffer);
}
function unpacked(value, numbers) {
  if (Array.isArray(value)) return value.map((one) => unpacked(one, numbers));
  if (value === null || typeof value !== "object") return value;
  if (Array.isArray(value.$)) return numbers.subarray(value.$[0], value.$[0] + value.$[1]);
  return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, unpacked(one, numbers)]));
}

/* ---- small pieces of the page ---- */
function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}
/* Plotly interprets a few tags in texts; names must be shown as they are. */
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const lines = (text) => plain(text).replace(/\n/g, "<br>");
const isKnown = (value) => value !== null && value !== undefined && Number.isFinite(value);
function shown(value) {
  if (!isKnown(value)) return "";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(2);
  return Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(4)));
}
function section(id, title, note) {
  const made = make("section", { id, class: "interactive" }, make("h2", {}, title));
  if (note) made.append(make("p", { class: "sub" }, note));
  byId("figures").append(made);
  return made;
}
function select(bar, name, label, options, changed) {
  const box = make("select", { name, onchange: changed });
  fill(box, options);
  bar.append(make("label", {}, label + " ", box));
  return box;
}
function fill(box, options) {
  const before = box.value;
  box.replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
  if (options.some(([value]) => String(value) === before)) box.value = before;
}
function tick(bar, name, label, checked, changed) {
  const box = make("input", { type: "checkbox", name, onchange: changed });
  box.checked = checked;
  bar.append(make("label", {}, box, " " + label));
  return box;
}
const controls = () => make("div", { class: "controls" });
