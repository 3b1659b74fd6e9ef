// The page of a bytelm server. Everything is bytes (Uint8Array); text is only shown, and data are shown as text nodes.

const SHOWN = 4096; // bytes of an input that are read, and shown, at most
const VIEWED = 8192; // bytes of input and completion that are shown as patches
const FILE = 20 << 20; // bytes of a file that is sent to be encoded
const PAUSE = 250; // ms after the last key until the input is read
const AGAIN = 300; // ms at least between views of what is being generated
const BEST = 10; // next bytes that are shown
const TALL = 8; // bits of a full bar

const byId = (id) => document.getElementById(id);
const number = (value, digits = 0) =>
  value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const counted = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;
const percent = (share) => // in one piece: the space is narrow, and does not break
  `${share < 0.001 ? "<0.1" : number(100 * share, share < 0.0995 ? 1 : 0)}\u202f%`;

const pause = (ms) => new Promise((done) => setTimeout(done, ms));

function element(name, text = "", kind = "") {
  const made = document.createElement(name);
  if (text) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

// --- bytes and text --------------------------------------------------------------------------------------------------

const encoder = new TextEncoder();
const encode = (text) => encoder.encode(text);
const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
const hex = (byte) => `\\x${byte.toString(16).padStart(2, "0")}`;
const same = (a, b) => a.length === b.length && a.every((byte, index) => byte === b[index]);

function joined(...parts) {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  parts.reduce((at, part) => (whole.set(part, at), at + part.length), 0);
  return whole;
}

function toBase64(bytes) {
  let text = "";
  for (let at = 0; at < bytes.length; at += 8192) text += String.fromCharCode(...bytes.subarray(at, at + 8192));
  return btoa(text);
}

const fromBase64 = (text) => Uint8Array.from(atob(text), (char) => char.charCodeAt(0));

/** The characters of bytes, as {at, size, text}: text is null for a byte that belongs to none. Unless this is the end
 * (`final`), an unfinished last character is left out. */
function characters(bytes, final = true) {
  const found = [];
  for (let at = 0; at < bytes.length; ) {
    const lead = bytes[at];
    let size = lead < 0x80 ? 1 : lead < 0xc2 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf5 ? 4 : 0;
    const slice = bytes.subarray(at, at + size);
    let text = null;
    if (size === 1) text = String.fromCharCode(lead);
    else if (size) {
      if (slice.length < size && !final && slice.every((byte, index) => !index || byte >> 6 === 2)) break;
      try {
        text = strict.decode(slice);
      } catch {
        size = 1;
      }
    }
    found.push({ at, size: size || 1, text });
    at += size || 1;
  }
  return found;
}

const NAMED = { "\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\" };
const VALUES = { n: 10, r: 13, t: 9, "\\": 92 };
const control = (text) => text === null || (text.length === 1 && (text < " " || (text > "~" && text < "\xa0")));

/** Whether a character shows nothing, or turns the text around it; joiners of emoji and scripts do neither. */
const hidden = (text) => control(text) || (/^\p{C}$/u.test(text) && text !== "\u200c" && text !== "\u200d");

/** Bytes as text in which any byte can be written; a line end is shown as it is. */
function escaped(bytes) {
  const all = (at, size) => Array.from(bytes.subarray(at, at + size), hex).join("");
  return characters(bytes).map(({ at, size, text }) =>
    text === "\n" ? text : NAMED[text] ?? (hidden(text) ? all(at, size) : text)).join("");
}

/** The bytes of such a text. A backslash that begins nothing known is a backslash. */
function unescaped(text) {
  const parts = text.split(/(\\x[0-9a-fA-F]{2}|\\[nrt\\])/);
  return joined(...parts.map((part, index) =>
    index % 2 === 0 ? encode(part) : Uint8Array.of(part.length === 4 ? parseInt(part.slice(2), 16) : VALUES[part[1]])));
}

/** How a character looks in the view of patches: [text, kind]. */
function glyph(text, byte) {
  if (text === " ") return ["·", "mark"];
  if (text === "\n") return ["⏎", "mark"];
  if (text === "\t") return ["⇥", "mark"];
  if (control(text)) return [hex(byte), "code"];
  if (/^\p{M}$/u.test(text)) return [`◌${text}`, ""];
  const point = () => text.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
  if (/^[\p{C}\p{Z}]$/u.test(text)) return [`U+${point()}`, "code"];
  return [text, ""];
}

const SPOKEN = { 9: "tab", 10: "line end", 13: "carriage return", 32: "space" };
const spoken = (byte) => SPOKEN[byte] ?? (byte > 32 && byte < 127 ? String.fromCharCode(byte) : hex(byte));

/** The byte of a token's name; null for a special id such as <eos>. */
function byteOf(token) {
  if (token.startsWith("bytes:\\x")) return parseInt(token.slice(8), 16);
  return token.length === 1 ? token.charCodeAt(0) : null;
}

// --- the API ---------------------------------------------------------------------------------------------------------

class ApiError extends Error {}

const BROKEN = "the answer broke off: the connection to the server is lost";

async function problem(response) {
  let message = `${response.status} ${response.statusText}`.trim();
  try {
    message = (await response.json()).error.message;
  } catch {
    // not an answer of the API: its status is all there is to show
  }
  const wait = response.headers.get("retry-after");
  const error = new ApiError(String(message));
  error.retry = response.status === 429 && wait ? Number(wait) * 1000 : 0;
  return error;
}

async function request(path, body, signal) {
  const headers = { "content-type": "application/json" };
  const options = body && { method: "POST", headers, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, { ...options, signal });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError("the server does not answer: check that it runs");
  }
  if (!response.ok) throw await problem(response);
  return response;
}

const json = async (path, body, signal) => (await request(path, body, signal)).json();

/** The objects of a stream of server-sent events. */
async function* events(path, body, signal) {
  const response = await request(path, { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ApiError(BROKEN);
    const lines = (held + value).split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new ApiError(event.error.message);
      yield event;
    }
  }
}

// --- the input, shared by all columns --------------------------------------------------------------------------------

const input = { bytes: new Uint8Array(), file: null, timer: 0 };
const columns = [];
let models = [];

/** Bytes of an input that every model for text reads, with room for an answer. */
const room = () => Math.min(SHOWN, ...models.filter((m) => !isMedia(m)).map((m) => Math.floor(m.max_model_len / 2)));
const isMedia = (model) => Boolean(model.modality && !model.modality.text);

/** Take bytes as the input. They are written as they are where a text field keeps them, and with escapes otherwise. */
function take(bytes, file = null) {
  input.bytes = bytes;
  input.file = file;
  const area = byId("text"), plain = asText(bytes);
  area.value = plain ?? "";
  const exact = plain !== null && !/[\0-\x08\x0b-\x1f\x7f]/.test(plain);
  byId("escapes").checked = !exact;
  if (!exact) area.value = escaped(bytes);
  // What is typed next goes to the end. Some browsers put the caret of an unfocused field at its start, a frame later.
  requestAnimationFrame(() => area.setSelectionRange(area.value.length, area.value.length));
  changed();
}

function asText(bytes) {
  try {
    return strict.decode(bytes);
  } catch {
    return null;
  }
}

function typed() {
  const text = byId("text").value;
  input.bytes = byId("escapes").checked ? unescaped(text) : encode(text);
  input.file = null;
  changed();
}

function changed() {
  const { bytes, file } = input, whole = file ? file.size : bytes.length, read = Math.min(bytes.length, room());
  const size = counted(whole, "byte"), name = file ? `${file.name}: ` : "";
  const part = `the first ${number(read)} of ${size} are ${file ? "read" : "shown"}`;
  byId("about").textContent = whole ? name + (read < whole ? part : size) : "";
  for (const column of columns) column.forget();
  clearTimeout(input.timer);
  input.timer = setTimeout(() => columns.forEach((column) => column.read()), PAUSE);
}

async function open(file) {
  if (!file) return;
  if (file.size > FILE) return complain(`${file.name} has ${number(file.size)} bytes: give at most ${number(FILE)}`);
  complain("");
  const data = new Uint8Array(await file.arrayBuffer());
  take(trimmed(data.subarray(0, room()), data.length), { name: file.name, size: data.length, data });
  for (const column of columns) if (isMedia(column.model)) column.generate();
}

/** A beginning that does not end within a character. */
function trimmed(bytes, whole) {
  if (bytes.length === whole) return bytes;
  const last = characters(bytes, false).at(-1);
  return last ? bytes.subarray(0, last.at + last.size) : bytes;
}

function complain(message) {
  byId("problem").textContent = message;
  byId("problem").hidden = !message;
}

/** The settings as fields of a request; null, with the reason shown, where one cannot be used. */
function settings() {
  const found = {};
  for (const id of ["temperature", "top_p", "max_tokens", "seed"]) {
    const field = byId(id);
    if (!field.checkValidity()) {
      complain(`${field.labels[0].textContent.trim()}: ${field.validationMessage}`);
      field.focus();
      return null;
    }
    if (field.value !== "") found[id] = field.valueAsNumber;
  }
  complain("");
  const stop = byId("stop").value;
  if (stop) found.stop = new TextDecoder().decode(unescaped(stop));
  if (byId("utf8").checked) found.utf8 = true;
  return found;
}

// --- a view of bytes -------------------------------------------------------------------------------------------------

/** Bytes with their patches, a bar under each byte, and a cursor that says more of one. */
class View {
  constructor(node, readout) {
    this.node = node;
    this.readout = readout;
    this.groups = []; // {key, node} of each patch
    this.cells = []; // the node of each character
    this.cursor = -1;
    this.describe = () => "";
    node.addEventListener("pointerover", ({ target }) => this.move(this.cells.indexOf(target.closest(".cell"))));
    node.addEventListener("keydown", (event) => this.pressed(event));
  }

  /** Show groups of cells; those before the first that differs stay as they are. */
  show(groups, describe) {
    this.describe = describe;
    this.cells[this.cursor]?.classList.remove("at");
    const keys = groups.map((cells) => cells.map((cell) => cell.key).join(" "));
    let at = 0;
    while (at < keys.length && this.groups[at]?.key === keys[at]) at++;
    for (const { node } of this.groups.splice(at)) node.remove();
    const added = groups.slice(at).map((cells, index) => ({ key: keys[at + index], node: drawn(cells) }));
    this.groups.push(...added);
    this.node.querySelector(".empty")?.remove();
    this.node.append(...added.map(({ node }) => node));
    this.cells = [...this.node.querySelectorAll(".cell")];
    if (!groups.length) this.node.append(element("span", "nothing yet", "empty"));
    this.node.setAttribute("aria-valuemax", String(Math.max(0, this.cells.length - 1)));
    this.move(Math.min(this.cursor, this.cells.length - 1));
  }

  move(cursor) {
    this.cells[this.cursor]?.classList.remove("at");
    this.cursor = cursor;
    this.cells[cursor]?.classList.add("at");
    const said = cursor < 0 ? "" : this.describe(cursor);
    const { length } = this.cells;
    this.readout.textContent = said || (length ? "Point at a byte, or use the arrow keys, to see more of it." : "");
    this.node.setAttribute("aria-valuenow", String(Math.max(0, cursor)));
    this.node.setAttribute("aria-valuetext", said || `${counted(length, "character")}, arrow keys show each`);
  }

  pressed(event) {
    const last = this.cells.length - 1;
    const to = { ArrowRight: this.cursor + 1, ArrowLeft: this.cursor - 1, Home: 0, End: last }[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    this.move(Math.max(0, Math.min(last, to)));
    this.cells[this.cursor].scrollIntoView({ block: "nearest" });
  }
}

const UNBROKEN = 32; // characters of a patch that are kept in one line

/** What the view shows of bytes: a cell for each character, in groups: the patches, or words where there are none.
 * `patchOf[i]` counts patches, `bars[i]` are bits; bytes from `given` on are generated. */
function groupsOf(bytes, patchOf, bars, given) {
  const groups = [];
  let open = null;
  for (const { at, size, text } of characters(bytes)) {
    const [shown, kind] = glyph(text, bytes[at]), patch = patchOf?.[at];
    const marks = Array.from({ length: size }, (_, k) => {
      const bits = bars?.[at + k], cut = k > 0 && patchOf !== null && patchOf[at + k] !== patchOf[at + k - 1];
      return { cut, height: bits == null ? 0 : Math.max(0.04, Math.min(1, bits / TALL)), high: bits > TALL / 2 };
    });
    const made = at >= given, line = text === "\n";
    const key = `${shown} ${patch} ${made} ${marks.map((mark) => `${mark.cut}${mark.height.toFixed(3)}`)}`;
    if (!open || open.at(-1).patch !== patch || (!patchOf && open.at(-1).space)) groups.push((open = []));
    open.push({ key, shown, kind, marks, patch, made, line, space: text === " " || line });
  }
  return groups;
}

function drawn(cells) {
  const { patch } = cells[0];
  const group = element("span", "", patch === undefined ? "word" : `patch ${patch % 2 ? "odd" : "even"}`);
  group.classList.toggle("long", cells.length > UNBROKEN);
  for (const { shown, kind, marks, made, line } of cells) {
    const cell = element("span", "", made ? "cell made" : "cell");
    cell.style.setProperty("--bytes", marks.length);
    cell.append(element("b", shown, kind));
    for (const { cut, height, high } of marks) {
      const bar = element("i", "", `${cut ? "cut" : ""}${high ? " high" : ""}`);
      bar.style.setProperty("--height", height);
      cell.append(bar);
    }
    group.append(cell);
    if (line) group.append(element("br"));
  }
  return group;
}

/** The number of the patch of each byte. */
function numbered(starts, length) {
  const opens = new Uint8Array(length), found = new Uint32Array(length);
  for (const start of starts) opens[start] = 1;
  for (let at = 0, patch = 0; at < length; at++) found[at] = patch += opens[at] || (at === 0 ? 1 : 0);
  return found;
}

// --- a column: one model ---------------------------------------------------------------------------------------------

const LN2 = Math.log(2);
const NOTHING = { of: null, read: 0, bits: null, top: null, next: null, starts: null, entropy: null };
const UNWRITTEN = { bytes: new Uint8Array(), bits: [], starts: null, entropy: null };

class Column {
  constructor(model) {
    this.node = byId("column").content.firstElementChild.cloneNode(true);
    this.part = (selector) => this.node.querySelector(selector);
    this.view = new View(this.part(".view"), this.part(".readout"));
    this.found = NOTHING;
    this.made = UNWRITTEN;
    this.reading = this.writing = null; // what can be aborted
    this.latest = null; // the newest generation, as long as what it says is of this input and this model
    this.urls = [];
    const choice = this.part(".top select");
    for (const one of models) choice.append(element("option", one.id));
    choice.addEventListener("change", () => this.use(models[choice.selectedIndex]));
    this.part(".bars select").addEventListener("change", () => this.draw());
    this.part(".keep").addEventListener("click", () => this.keep());
    this.part(".remove").addEventListener("click", () => close(this));
    this.next = Array.from({ length: BEST + 1 }, () => this.button());
    choice.selectedIndex = models.indexOf(model);
    this.use(model);
  }

  /** Switch to a model. */
  use(model) {
    this.model = model;
    const { parameters, step, bits_per_byte: bits, description } = model, media = isMedia(model);
    const facts = [description, counted(parameters, "parameter")];
    if (step !== null) facts.push(`step ${number(step)}`);
    if (bits !== null) facts.push(`${number(bits, 3)} ${this.unit} in validation`);
    this.part(".facts").textContent = facts.join(" · ");
    this.node.setAttribute("aria-label", `Model ${model.id}`);
    this.part(".inside").hidden = media;
    this.part(".hint").hidden = !media;
    const bars = this.part(".bars select");
    const kinds = model.patches === "entropy" ? ["entropy", "bits"] : ["bits"];
    bars.replaceChildren(...kinds.map((kind) => element("option", kind)));
    this.part(".bars").hidden = kinds.length < 2;
    const scaled = kinds.length === 1 && model.patches !== "tokens";
    this.part(".scale").textContent = scaled ? `bars: bits, ${TALL} at full height` : "";
    this.part(".inside h2").textContent = model.patches === "tokens" ? "Tokens" : model.patches ? "Patches" : "Bytes";
    if (media) this.part(".hint").textContent = invitation(model.modality);
    this.forget();
    this.found = NOTHING;
    if (media && input.file) this.generate();
    else this.read();
  }

  get unit() {
    return this.model.modality?.size ? "bits per dimension" : "bits per byte";
  }

  /** The input is another one: end what is under way, and drop the completion. */
  forget() {
    this.latest = null;
    this.stop();
    this.reading?.abort();
    this.reading = null;
    this.made = UNWRITTEN;
    this.fail("");
    for (const url of this.urls.splice(0)) URL.revokeObjectURL(url);
    this.part(".pair").replaceChildren();
    this.part(".completion").replaceChildren();
    for (const name of [".speed", ".ended"]) this.part(name).textContent = "";
    this.part(".keep").hidden = true;
    this.part(".done").hidden = this.part(".completion").hidden = true;
  }

  fail(message) {
    this.part(".error").textContent = message;
    this.part(".error").hidden = !message;
  }

  /** Ask what the model makes of the input. */
  async read() {
    if (isMedia(this.model)) return;
    this.reading?.abort();
    const { signal } = (this.reading = new AbortController()), { model } = this;
    const of = input.bytes, data = of.subarray(0, room());
    this.part(".inside").setAttribute("aria-busy", "true");
    const asked = [this.score(model, data, signal), this.cut(model, data, signal)];
    const done = await Promise.allSettled(asked);
    if (signal.aborted) return;
    this.part(".inside").removeAttribute("aria-busy");
    this.reading = null;
    const errors = done.filter((one) => one.reason).map((one) => one.reason);
    this.fail(errors[0]?.message ?? "");
    if (errors[0]?.retry) setTimeout(() => !signal.aborted && !this.reading && this.read(), errors[0].retry);
    this.found = Object.assign({ ...NOTHING, of, read: data.length }, ...done.map((one) => one.value ?? {}));
    this.draw();
  }

  /** Bits of each byte, and the most probable next bytes. */
  async score(model, data, signal) {
    if (model.patches === "tokens") return {}; // generates tokens: bytes have no probabilities of their own
    const asked = { max_tokens: 1, echo: true, logprobs: BEST, temperature: 0 };
    const body = { ...asked, model: model.id, prompt_b64: toBase64(data) };
    const { logprobs } = (await json("/v1/completions", body, signal)).choices[0];
    const nats = logprobs.token_logprobs.slice(0, data.length);
    const top = logprobs.top_logprobs.map((one) => one && Object.entries(one).sort((a, b) => b[1] - a[1]));
    return { bits: nats.map((one) => (one === null ? null : -one / LN2)), top, next: top[data.length] ?? null };
  }

  /** Patches, and the entropy before each byte. */
  async cut(model, data, signal) {
    if (!model.patches || !data.length) return {};
    const body = { model: model.id, prompt_b64: toBase64(data) };
    const { patch_starts: starts, entropy_bits: entropy } = await json("/v1/patches", body, signal);
    return { starts, entropy };
  }

  /** Show what is known of the input and of its completion. */
  draw() {
    const { found, made } = this, given = found.read;
    if (found.of !== input.bytes) return; // it is being read
    const all = given < input.bytes.length ? input.bytes.subarray(0, given) : joined(input.bytes, made.bytes);
    const whole = all.subarray(0, VIEWED);
    const bits = found.bits && [...found.bits, ...made.bits];
    const starts = made.starts ?? found.starts, entropy = made.entropy ?? found.entropy;
    const patchOf = starts && numbered(starts, whole.length), chars = characters(whole);
    const bars = this.part(".bars select").value === "entropy" ? entropy : bits;
    this.view.show(groupsOf(whole, patchOf, bars, given), (index) =>
      said(whole, chars[index], { bits, entropy, patchOf, top: found.top }));
    this.part(".summary").replaceChildren(...this.summary(given));
    this.buttons();
  }

  /** Figures of the input. */
  summary(given) {
    const { bits, starts } = this.found, figures = [];
    if (bits?.length) {
      const sum = bits.reduce((total, one) => total + (one ?? 0), 0);
      figures.push([number(sum / bits.length, 2), "bits per byte"], [number(sum), "bits"]);
    }
    if (starts?.length) {
      const word = this.model.patches === "tokens" ? "token" : "patch";
      const plural = word === "patch" ? "patches" : "tokens";
      figures.push([number(starts.length), starts.length === 1 ? word : plural]);
      figures.push([number(given / starts.length, 1), `bytes per ${word}`]);
    }
    return figures.map(([figure, unit]) => {
      const one = element("span");
      one.append(element("strong", figure), ` ${unit} `);
      return one;
    });
  }

  /** A place for one of the next bytes; it stays the same node, so that a focus stays where it is. */
  button() {
    const button = element("button");
    button.type = "button";
    button.append(element("b"), element("span"));
    button.addEventListener("click", () => {
      take(joined(input.bytes, Uint8Array.of(Number(button.dataset.byte))));
    });
    button.hidden = true;
    this.part(".next").append(button);
    return button;
  }

  buttons() {
    const next = this.found.next ?? [];
    const place = this.part(".next");
    place.hidden = place.previousElementSibling.hidden = !next.length;
    this.next.forEach((button, index) => {
      const entry = index < BEST ? next[index] : undefined;
      button.hidden = !entry;
      if (!entry) return;
      const share = Math.exp(entry[1]), byte = byteOf(entry[0]);
      const [shown, kind] = byte === null ? [entry[0].replace(/^<eos>$/, "end"), "mark"] :
        glyph(byte < 128 ? String.fromCharCode(byte) : null, byte);
      const [name, probability] = button.children;
      name.textContent = shown;
      name.className = kind;
      probability.textContent = percent(share);
      button.style.setProperty("--share", share);
      button.disabled = byte === null;
      button.dataset.byte = byte ?? "";
      const what = byte === null ? "end of the text" : spoken(byte);
      button.setAttribute("aria-label", `${what}, ${percent(share)}`);
    });
  }

  // --- generation

  /** Continue the input, or complete the dropped file. */
  async generate() {
    const chosen = settings();
    if (!chosen) return;
    this.stop();
    const mine = (this.latest = this.writing = new AbortController());
    const current = () => this.latest === mine, media = isMedia(this.model);
    this.fail("");
    running();
    try {
      await (media ? this.complete(chosen, mine.signal, current) : this.write(chosen, mine.signal, current));
    } catch (error) {
      if (current() && !mine.signal.aborted) this.fail(error.message);
    }
    if (this.writing === mine) this.writing = null;
    running();
  }

  stop() {
    this.writing?.abort();
    this.writing = null;
    running();
  }

  /** The streamed bytes. `show(bytes, bits, final)` is called at most once a frame, and at the end. */
  async stream(body, signal, current, show) {
    const begun = performance.now(), speed = this.part(".speed"), bits = [];
    let bytes = new Uint8Array(), first = null, last = begun, reason = "", frame = 0, failure = null;
    const draw = (final) => {
      frame = 0;
      if (!current()) return;
      const told = [];
      if (first) told.push(counted(bytes.length, "byte"));
      if (first && last > first.at) {
        told.push(`${number((1000 * (bytes.length - first.bytes)) / (last - first.at))} bytes/s`);
      }
      if (first) told.push(`first byte after ${number(first.at - begun)} ms`);
      speed.textContent = told.join(" · ");
      show(bytes, bits, final);
    };
    speed.textContent = "waiting for the first byte";
    this.part(".ended").textContent = "";
    try {
      for await (const { choices: [choice] } of events("/v1/completions", body, signal)) {
        if (!choice) continue;
        const piece = fromBase64(choice.bytes_b64 ?? ""), { logprobs } = choice;
        logprobs?.bytes.forEach((byte, index) => byte !== null && bits.push(-logprobs.token_logprobs[index] / LN2));
        bytes = joined(bytes, piece);
        if (piece.length) last = performance.now();
        if (piece.length) first ??= { at: last, bytes: piece.length };
        reason = choice.finish_reason ?? reason;
        frame ||= requestAnimationFrame(() => draw(false));
      }
    } catch (error) {
      if (!signal.aborted) failure = error instanceof ApiError ? error : new ApiError(BROKEN);
    }
    cancelAnimationFrame(frame);
    draw(true);
    if (failure) throw failure;
    const ended = reason === "length" ? "as many as were asked for" : "ended by the model or a stop text";
    const why = signal.aborted ? "stopped" : ended;
    if (current()) this.part(".ended").textContent = `${counted(bytes.length, "byte")} generated: ${why}`;
    return bytes;
  }

  /** A completion of text. */
  async write(chosen, signal, current) {
    const { model } = this, prompt = input.bytes, most = model.max_model_len - 1 - prompt.length;
    const body = { ...chosen, model: model.id, prompt_b64: toBase64(prompt) };
    if (model.patches !== "tokens") body.logprobs = 0; // tokens are no bytes, and have no probabilities here
    if (most > 0) body.max_tokens = Math.min(chosen.max_tokens ?? 256, most);
    const completion = this.part(".completion"), keep = this.part(".keep"), text = { done: 0 };
    completion.replaceChildren();
    completion.setAttribute("aria-busy", "true");
    completion.hidden = this.part(".done").hidden = false;
    keep.hidden = true;
    this.made = UNWRITTEN;
    let cutting = null;
    const cut = async () => {
      const whole = joined(prompt, this.made.bytes).subarray(0, VIEWED);
      const patches = await this.cut(model, whole).catch(() => ({})); // the completion itself has no part in this
      cutting = null;
      if (!current()) return;
      this.made = { ...this.made, ...patches };
      this.draw();
    };
    const later = () => pause(AGAIN).then(cut);
    try {
      await this.stream(body, signal, current, (bytes, bits, final) => {
        this.made = { ...this.made, bytes, bits };
        write(completion, bytes, text, final);
        this.draw();
        cutting ??= model.patches && !final ? later() : null;
      });
    } finally {
      if (current()) {
        completion.removeAttribute("aria-busy");
        keep.hidden = !this.made.bytes.length;
      }
    }
    await cutting;
    if (current() && model.patches) await cut();
  }

  /** The completion becomes part of the input. */
  keep() {
    take(joined(input.bytes, this.made.bytes));
    byId("text").focus();
  }

  /** A completion of a picture or a sound: the first half is given, the rest is generated. */
  async complete(chosen, signal, current) {
    const { model } = this, { modality } = model;
    const whole = await this.document(model, signal);
    const unit = Math.max(modality.row, modality.unit), half = Math.floor(whole.length / 2 / unit) * unit;
    const given = whole.subarray(0, half), { stop, utf8, ...sampling } = chosen;
    const rest = modality.size ? modality.size - half : whole.length - half || chosen.max_tokens || 256;
    const body = { ...sampling, model: model.id, prompt_b64: toBase64(given), max_tokens: rest, ignore_eos: true };
    for (const url of this.urls.splice(0)) URL.revokeObjectURL(url);
    this.part(".pair").replaceChildren();
    this.part(".done").hidden = false;
    if (whole.length) await this.show("Original", this.figure("Original", modality), model, whole, current);
    const name = whole.length ? "First half, and its completion" : "Generated";
    const figure = this.figure(name, modality);
    let drawing = null;
    const bytes = await this.stream(body, signal, current, (bytes, _, final) => {
      if (final || modality.suffix !== ".png") return;
      drawing ??= this.show(name, figure, model, joined(given, bytes), current)
        .catch(() => {}).then(() => pause(AGAIN)).then(() => (drawing = null));
    });
    await drawing;
    await this.show(name, figure, model, joined(given, bytes), current);
  }

  /** A figure, empty yet. */
  figure(name, modality) {
    const figure = element("figure"), media = element(modality.suffix === ".png" ? "img" : "audio");
    if (media.tagName === "IMG") media.alt = name;
    else media.controls = true;
    media.setAttribute("aria-label", name);
    figure.append(media, element("figcaption", name));
    return figure;
  }

  /** Show a document as the file that it is. */
  async show(name, figure, model, bytes, current) {
    const file = await (await request("/v1/decode", { model: model.id, bytes_b64: toBase64(bytes) })).blob();
    if (!current()) return;
    const url = URL.createObjectURL(file);
    this.urls.push(url);
    figure.firstChild.src = url;
    if (!figure.isConnected) this.part(".pair").append(figure);
  }

  /** The document of the dropped file: empty without one. */
  async document(model, signal) {
    if (!input.file) return new Uint8Array();
    const body = { model: model.id, name: input.file.name, file_b64: toBase64(input.file.data) };
    const bytes = fromBase64((await json("/v1/encode", body, signal)).bytes_b64);
    const { modality: { size, unit } } = model, most = model.max_model_len - 1;
    return size ? bytes : bytes.subarray(0, Math.floor(Math.min(bytes.length, most) / unit) * unit);
  }
}

function invitation({ name, size }) {
  const what = size ? `documents of ${number(size)} bytes` : "documents of any length";
  return `This model reads ${name} files, as ${what}. Drop one: its first half is kept, and the rest generated. ` +
    "Generate without a file makes one from nothing.";
}

/** More of one character: its bytes, bits, entropy, patch, and what else was probable. */
function said(bytes, { at, size }, { bits, entropy, patchOf, top }) {
  const total = (list) => list.slice(at, at + size).reduce((sum, one) => sum + (one ?? 0), 0);
  const own = [...bytes.subarray(at, at + size)], text = own.map((byte) => hex(byte).slice(2)).join(" ");
  const name = size > 1 ? strict.decode(bytes.subarray(at, at + size)) : spoken(own[0]);
  const parts = [`${name} is byte ${number(at)}${size > 1 ? ` to ${number(at + size - 1)}` : ""}, hex ${text}`];
  if (bits?.[at] != null) parts.push(`${number(total(bits), 2)} bits`);
  if (entropy?.[at] != null) parts.push(`entropy ${number(entropy[at], 2)} bits`);
  const length = patchOf?.filter((one) => one === patchOf[at]).length;
  if (patchOf) parts.push(`patch ${number(patchOf[at])}, ${counted(length, "byte")}`);
  const others = (top?.[at] ?? []).slice(0, 4).map(([token, nats]) =>
    `${byteOf(token) === null ? "end" : spoken(byteOf(token))} ${percent(Math.exp(nats))}`);
  if (others.length) parts.push(`expected: ${others.join(", ")}`);
  return parts.join(" · ");
}

/** Add bytes that are new since the last call to a text: characters whole, other bytes as \xHH. */
function write(node, bytes, text, final) {
  const start = text.done;
  let run = "";
  for (const { at, size, text: char } of characters(bytes.subarray(start), final)) {
    text.done += size;
    if (char === "\n" || char === "\t" || !hidden(char)) {
      run += char;
      continue;
    }
    const own = Array.from(bytes.subarray(start + at, start + at + size), hex);
    node.append(run, ...own.map((one) => element("span", one, "code")));
    run = "";
  }
  node.append(run);
}

// --- the page --------------------------------------------------------------------------------------------------------

function running() {
  const busy = columns.some((column) => column.writing);
  if (!busy && document.activeElement === byId("stopping")) byId("generate").focus();
  byId("stopping").disabled = !busy;
}

function add(model) {
  const column = new Column(model);
  columns.push(column);
  byId("columns").append(column.node);
  arranged();
  return column;
}

function close(column) {
  column.forget();
  columns.splice(columns.indexOf(column), 1);
  column.node.remove();
  arranged();
  byId("compare").focus();
}

function arranged() {
  byId("columns").classList.toggle("two", columns.length > 1);
  byId("compare").hidden = models.length < 2 || columns.length > 1;
  for (const column of columns) column.part(".remove").hidden = columns.length < 2;
}

const generate = () => columns.forEach((column) => column.generate());
const stop = () => columns.forEach((column) => column.stop());

function listen() {
  byId("text").addEventListener("input", typed);
  byId("escapes").addEventListener("change", () => {
    const { bytes } = input, on = byId("escapes").checked;
    byId("text").value = on ? escaped(bytes) : new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes);
    if (!on && !same(encode(byId("text").value), bytes)) take(bytes, input.file); // only escapes are exact
  });
  byId("clear").addEventListener("click", () => (take(new Uint8Array()), byId("text").focus()));
  byId("choose").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", ({ target }) => open(target.files[0]).then(() => (target.value = "")));
  byId("settings").addEventListener("submit", (event) => (event.preventDefault(), generate()));
  byId("stopping").addEventListener("click", stop);
  byId("compare").addEventListener("click", () =>
    add(models.find((model) => model !== columns[0].model)).part("select").focus());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) (event.preventDefault(), generate());
    if (event.key === "Escape") stop();
  });
  document.addEventListener("paste", ({ clipboardData }) => open(clipboardData.files[0]));
  document.addEventListener("dragover", (event) => (event.preventDefault(), document.body.classList.add("over")));
  document.addEventListener("dragleave", (event) => event.relatedTarget || document.body.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("over");
    open(event.dataTransfer.files[0]);
  });
}

async function start() {
  listen();
  try {
    models = (await json("/v1/models")).data;
    typed(); // a browser may have kept the text of an earlier visit
    add(models[0]);
  } catch (error) {
    complain(error.message);
  }
  byId("text").focus();
}

start();
