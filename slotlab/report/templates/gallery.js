"use strict";
/* The gallery. Soft masks are upsampled bilinearly (align_corners = false) and decided by the largest, the lowest
   slot winning a tie: what slotlab.masks.labels does, on the same masks. */
const DATA = JSON.parse(document.getElementById("data").textContent);
const view = { mode: "slots", colours: DATA.cards.some((card) => card.truth) ? "object" : "slot", boundaries: false, together: false };
const cards = [];

async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function pixelsOf(uri, width, height) {
  const image = new Image();
  image.src = uri;
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0, width, height);
  return context.getImageData(0, 0, width, height);
}

/* Where each pixel falls between two cells of the grid: [lower, upper, share of the upper]. */
function between(cells, pixels) {
  const lower = new Uint16Array(pixels), upper = new Uint16Array(pixels), share = new Float32Array(pixels);
  for (let p = 0; p < pixels; p++) {
    const at = Math.max(0, ((p + 0.5) * cells) / pixels - 0.5);
    lower[p] = Math.min(Math.floor(at), cells - 1);
    upper[p] = Math.min(lower[p] + 1, cells - 1);
    share[p] = at - lower[p];
  }
  return [lower, upper, share];
}

class RunView {
  constructor(packed, masks, size) {
    Object.assign(this, packed);
    [this.height, this.width] = size;
    this.values = packed.bits === 16 ? new Uint16Array(masks.buffer) : masks;
    this.levels = 2 ** packed.bits - 1;
    this.rows = between(this.grid[0], this.height);
    this.columns = between(this.grid[1], this.width);
    this.decided = new Map();
  }

  /* One slot's soft mask at every pixel: Float64Array(height * width), as flat masks differ late in their digits. */
  soft(t, slot) {
    const [rows, columns] = this.grid, { width, height } = this;
    const [least, largest] = this.ranges[t], step = (largest - least) / this.levels;
    const start = (t * this.slots + slot) * rows * columns;
    const [left, right, across] = this.columns, [above, below, down] = this.rows;
    const wide = new Float64Array(rows * width);
    for (let r = 0; r < rows; r++) {
      for (let x = 0; x < width; x++) {
        const a = this.values[start + r * columns + left[x]], b = this.values[start + r * columns + right[x]];
        wide[r * width + x] = least + (a + (b - a) * across[x]) * step;
      }
    }
    const fine = new Float64Array(width * height);
    for (let y = 0; y < height; y++) {
      const a = above[y] * width, b = below[y] * width, share = down[y];
      for (let x = 0; x < width; x++) fine[y * width + x] = wide[a + x] + (wide[b + x] - wide[a + x]) * share;
    }
    return fine;
  }

  /* Slot of every pixel, and its mask's value there. */
  decide(t) {
    if (!this.decided.has(t)) {
      const best = this.soft(t, 0), labels = new Uint8Array(best.length);
      for (let slot = 1; slot < this.slots; slot++) {
        const fine = this.soft(t, slot);
        for (let p = 0; p < fine.length; p++) if (fine[p] > best[p]) { best[p] = fine[p]; labels[p] = slot; }
      }
      if (this.decided.size > 64) this.decided.clear();
      this.decided.set(t, { labels, best });
    }
    return this.decided.get(t);
  }

  colourOf(t, slot) {
    const { objects, others } = DATA.palette;
    if (view.colours === "slot") return slot < objects.length ? objects[slot] : others[(slot - objects.length) % others.length];
    const object = this.matches[t][slot];
    if (object >= 0) return objects[object % objects.length];
    let place = 0;
    for (let k = 0; k < slot; k++) if (this.matches[t][k] < 0) place++;
    return others[place % others.length];
  }
}

class Card {
  constructor(element, packed) {
    Object.assign(this, { element, packed, t: 0, timer: null });
    [this.height, this.width] = packed.size;
    this.frames = packed.frames.map(() => null);
    this.slider = element.querySelector(".slider");
    this.play = element.querySelector(".play");
  }

  async load() {
    const [height, width] = this.packed.size;
    this.runs = await Promise.all(this.packed.runs.map(async (r) => new RunView(r, await inflate(r.masks), [height, width])));
    this.truth = this.packed.truth ? await inflate(this.packed.truth) : null;
    this.ignored = this.packed.ignored ? await inflate(this.packed.ignored) : null;
    this.chosen = this.runs.map((run) => this.firstSlot(run));
    this.bind();
    await this.show(Number(this.slider?.value ?? 0));
    this.element.dataset.ready = "";
  }

  /* The slot shown alone at first: the largest that stands for an object, else the largest but one. */
  firstSlot(run) {
    const order = run.mass[0].map((mass, slot) => [mass, slot]).sort((a, b) => b[0] - a[0]).map(([, slot]) => slot);
    return order.find((slot) => run.matches[0][slot] >= 0) ?? order[Math.min(1, order.length - 1)];
  }

  bind() {
    this.slider?.addEventListener("input", () => {
      const t = Number(this.slider.value);
      for (const card of view.together ? cards : [this]) card.seek(card === this ? t : Math.min(t, card.frames.length - 1));
    });
    this.play?.addEventListener("click", () => this.toggle());
    for (const input of this.element.querySelectorAll(".chip input")) {
      const choose = () => {
        this.chosen[Number(input.dataset.run)] = Number(input.value);
        setMode("single");
      };
      input.addEventListener("change", choose);
      input.addEventListener("click", choose);
    }
    this.spark();
  }

  toggle() {
    const playing = this.timer !== null;
    clearInterval(this.timer);
    this.timer = playing ? null : setInterval(() => this.seek((this.t + 1) % this.frames.length), 160);
    this.play.setAttribute("aria-pressed", String(!playing));
  }

  seek(t) {
    if (this.slider) this.slider.value = t;
    return this.show(t);
  }

  async show(t) {
    this.t = t;
    this.frames[t] ??= await pixelsOf(this.packed.frames[t], this.width, this.height);
    if (this.t === t) this.draw();
  }

  draw() {
    const t = this.t, frame = this.frames[t];
    if (!frame || !this.runs) return;
    for (const canvas of this.element.querySelectorAll("canvas")) {
      const run = canvas.dataset.panel === "run" ? Number(canvas.dataset.run) : null;
      const mode = run === null ? canvas.dataset.panel : view.mode;
      canvas.getContext("2d", { willReadFrequently: true }).putImageData(this.picture(mode, run), 0, 0);
    }
    if (this.slider) this.slider.setAttribute("aria-valuetext", `frame ${this.packed.indices[t] + 1} of ${this.packed.total}`);
    const count = this.element.querySelector(".frame-number");
    if (count) count.value = `${this.packed.indices[t] + 1} / ${this.packed.total}`;
    for (const name of this.element.querySelectorAll(".view-name")) name.textContent = viewName();
    this.runs.forEach((run, place) => this.describe(run, place, t));
  }

  describe(run, place, t) {
    const score = this.element.querySelector(`.frame-score[data-run="${place}"]`);
    const parts = DATA.scores.map(([key, title]) => [title, run.by_frame[key]]).filter(([, v]) => v && v[t] !== null);
    score.value = parts.map(([name, v]) => `${name} ${v[t].toFixed(2)}`).join("  ");
    for (const input of this.element.querySelectorAll(`.chip input[data-run="${place}"]`)) {
      const slot = Number(input.value), chip = input.parentElement;
      chip.style.setProperty("--c", `rgb(${run.colourOf(t, slot).join(" ")})`);
      chip.classList.toggle("faint", run.mass[t][slot] < 0.004);
      chip.title = `Slot ${slot}: ${(100 * run.mass[t][slot]).toFixed(1)} % of the frame`;
      input.setAttribute("aria-label", chip.title);
      input.checked = view.mode === "single" && this.chosen[place] === slot;
    }
  }

  picture(mode, place) {
    const { data: frame } = this.frames[this.t], picture = new ImageData(this.width, this.height), out = picture.data;
    const run = place === null ? null : this.runs[place];
    const ofFrame = (pixels) => pixels?.subarray(this.t * this.width * this.height, (this.t + 1) * this.width * this.height);
    const truth = ofFrame(this.truth), ignored = ofFrame(this.ignored);
    const { labels, best } = run ? run.decide(this.t) : {};
    let colour;
    if (mode === "truth") {
      const { objects, others, ignored: stripes, stripe } = DATA.palette;
      const striped = (p) => stripes[Math.floor(((p % this.width) + Math.floor(p / this.width)) / stripe) % stripes.length];
      colour = (p) => over(frame, p, ignored?.[p] ? striped(p) : truth[p] ? objects[(truth[p] - 1) % objects.length] : others[0]);
    }
    else if (mode === "slots") {
      const colours = Array.from({ length: run.slots }, (_, slot) => run.colourOf(this.t, slot));
      colour = (p) => over(frame, p, colours[labels[p]]);
    } else if (mode === "single") {
      const soft = run.soft(this.t, this.chosen[place]), ground = isDark() ? 28 : 237;
      colour = (p) => [0, 1, 2].map((c) => frame[4 * p + c] * soft[p] + ground * (1 - soft[p]));
    } else if (mode === "confidence") colour = (p) => ramp(best[p]);
    else colour = (p) => [frame[4 * p], frame[4 * p + 1], frame[4 * p + 2]];
    for (let p = 0; p < out.length / 4; p++) {
      const [r, g, b] = colour(p);
      out[4 * p] = r; out[4 * p + 1] = g; out[4 * p + 2] = b; out[4 * p + 3] = 255;
    }
    if (view.boundaries && labels) outline(out, labels, this.width, this.height);
    return picture;
  }

  /* The first score of every frame, above the slider. */
  spark() {
    const svg = this.element.querySelector(".spark"), [[key]] = DATA.scores, last = this.frames.length - 1;
    if (!svg || last < 1) return;
    let marks = '<line x1="0" x2="100" y1="23" y2="23"/>';
    for (const run of this.runs) {
      const values = run.by_frame[key] ?? [];
      let pen = "M", path = "";
      values.forEach((v, t) => {
        if (v === null) { pen = "M"; return; }
        path += `${pen}${((100 * t) / last).toFixed(2)} ${(23 - 22 * Math.max(0, v)).toFixed(2)}`;
        pen = "L";
      });
      if (path) marks += `<path d="${path}" style="--c:var(--line-${run.run % 7})"/>`;
    }
    svg.innerHTML = this.runs.some((run) => run.by_frame[key]) ? marks : "";
  }
}

/* A colour laid over the frame's brightness, so that shapes stay readable. */
function over(frame, p, [r, g, b]) {
  const light = 0.45 + (0.75 * (frame[4 * p] + frame[4 * p + 1] + frame[4 * p + 2])) / 765;
  return [r * light, g * light, b * light];
}

function ramp(value) {
  const stops = DATA.palette.confidence, at = Math.min(Math.max(value, 0), 1) * (stops.length - 1);
  const low = Math.min(Math.floor(at), stops.length - 2), share = at - low;
  return [0, 1, 2].map((c) => stops[low][c] + (stops[low + 1][c] - stops[low][c]) * share);
}

/* White lines with a dark rim where two neighbouring pixels belong to different slots. */
function outline(out, labels, width, height) {
  const edge = new Uint8Array(labels.length);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const p = y * width + x;
      if ((x + 1 < width && labels[p] !== labels[p + 1]) || (y + 1 < height && labels[p] !== labels[p + width])) edge[p] = 1;
    }
  }
  const paint = (p, value, share) => { for (let c = 0; c < 3; c++) out[4 * p + c] += (value - out[4 * p + c]) * share; };
  for (let y = 1; y < height - 1; y++) {
    for (let x = 1; x < width - 1; x++) {
      const p = y * width + x;
      if (!edge[p] && (edge[p - 1] || edge[p + 1] || edge[p - width] || edge[p + width])) paint(p, 16, 0.5);
    }
  }
  edge.forEach((is, p) => { if (is) paint(p, 255, 0.95); });
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function viewName() {
  return document.querySelector(`#views input[value="${view.mode}"]`)?.nextElementSibling.textContent ?? "";
}

function redraw() {
  document.getElementById("ramp")?.toggleAttribute("hidden", view.mode !== "confidence");
  for (const card of cards) card.draw();
}

function setMode(mode) {
  const input = document.querySelector(`#views input[value="${mode}"]`);
  if (!input) return;
  input.checked = true;
  view.mode = mode;
  redraw();
}

function setColours(colours) {
  view.colours = colours;
  const input = document.querySelector(`#colours input[value="${colours}"]`);
  if (input) input.checked = true;
  redraw();
}
