/* -- theme ------------------------------------------------------------------------------------------------ */
function keep(storage, key, value) { try { storage().setItem(key, value); } catch { /* a page from a file may have none */ } }
function kept(storage, key) { try { return storage().getItem(key); } catch { return null; } }

document.getElementById("theme").addEventListener("click", () => {
  const theme = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  keep(() => localStorage, "slotlab-theme", theme);
  redraw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

/* -- gallery ---------------------------------------------------------------------------------------------- */
for (const element of document.querySelectorAll(".card")) cards.push(new Card(element, DATA.cards[Number(element.dataset.card)]));
for (const input of document.querySelectorAll("#views input")) input.addEventListener("change", () => setMode(input.value));
for (const input of document.querySelectorAll("#colours input")) input.addEventListener("change", () => setColours(input.value));
const boundaries = document.getElementById("boundaries");
boundaries?.addEventListener("change", () => { view.boundaries = boundaries.checked; redraw(); });
document.getElementById("together")?.addEventListener("change", (event) => { view.together = event.target.checked; });

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !cards.length) return;
  const modes = [...document.querySelectorAll("#views input")].map((input) => input.value);
  if (/^[1-9]$/.test(event.key) && modes[Number(event.key) - 1]) setMode(modes[Number(event.key) - 1]);
  else if (event.key === "b") boundaries.click();
  else if (event.key === "c") setColours(view.colours === "slot" ? "object" : "slot");
});

/* -- charts ----------------------------------------------------------------------------------------------- */
const tip = document.getElementById("tip");
let cursor = null; // of the chart that the keyboard moves in

function rowsAt(chart, x) {
  return chart.lines.filter((line) => line.points.length).map((line) => {
    const point = line.points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
    return { ...line, point };
  });
}

function showTip(svg, x) {
  const chart = JSON.parse(svg.dataset.chart), rows = rowsAt(chart, x), [, top, , bottom] = chart.box;
  if (!rows.length) return;
  const nearest = rows.reduce((a, b) => (Math.abs(b.point[0] - x) < Math.abs(a.point[0] - x) ? b : a)).point;
  const shown = rows.filter((row) => Math.abs(row.point[0] - nearest[0]) < 6);
  svg.querySelector(".hover").innerHTML = `<line x1="${nearest[0]}" x2="${nearest[0]}" y1="${top}" y2="${bottom}"/>` +
    shown.map((row) => `<circle cx="${row.point[0]}" cy="${row.point[1]}" r="3.6" fill="var(--line-${row.colour})"/>`).join("");
  tip.replaceChildren();
  const head = tip.appendChild(document.createElement("div"));
  head.className = "tip-x";
  head.textContent = `${chart.x} ${nearest[2]}`;
  for (const row of shown) {
    const line = tip.appendChild(document.createElement("div"));
    line.className = "tip-row";
    line.innerHTML = `<span class="swatch" style="background:var(--line-${row.colour})"></span>`;
    if (chart.lines.length > 1) line.append(row.label);
    line.appendChild(document.createElement("b")).textContent = row.point[3];
  }
  tip.hidden = false;
  tip.dataset.x = nearest[0];
  placeTip(svg);
}

function placeTip(svg) {
  const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
  const left = box.left + Number(tip.dataset.x) * scale, width = tip.offsetWidth;
  tip.style.left = `${left + 14 + width > innerWidth ? left - 14 - width : left + 14}px`;
  tip.style.top = `${Math.max(60, box.top + 8)}px`;
}

function hideTip(svg) {
  svg.querySelector(".hover")?.replaceChildren();
  tip.hidden = true;
  cursor = null;
}

const chartOf = (event) => (event.target instanceof Element ? event.target.closest("svg.chart") : null);
document.addEventListener("pointermove", (event) => {
  const svg = chartOf(event);
  if (!svg) return;
  const box = svg.getBoundingClientRect();
  showTip(svg, ((event.clientX - box.left) * svg.viewBox.baseVal.width) / box.width);
});
document.addEventListener("pointerout", (event) => {
  const svg = chartOf(event);
  if (svg && !svg.contains(event.relatedTarget)) hideTip(svg);
});
document.addEventListener("focusout", (event) => { const svg = chartOf(event); if (svg) hideTip(svg); });
document.addEventListener("scroll", () => {
  if (cursor === null) tip.hidden = true;
  else placeTip(document.activeElement);
}, { passive: true });
document.addEventListener("keydown", (event) => {
  const svg = chartOf(event);
  if (!svg || !["ArrowLeft", "ArrowRight", "Escape"].includes(event.key)) return;
  event.preventDefault();
  if (event.key === "Escape") return hideTip(svg);
  const longest = JSON.parse(svg.dataset.chart).lines.map((line) => line.points).reduce((a, b) => (b.length > a.length ? b : a), []);
  if (!longest.length) return;
  cursor = cursor === null ? (event.key === "ArrowRight" ? 0 : longest.length - 1) : cursor + (event.key === "ArrowRight" ? 1 : -1);
  cursor = Math.min(Math.max(cursor, 0), longest.length - 1);
  showTip(svg, longest[cursor][0]);
});

/* -- where the reader is ---------------------------------------------------------------------------------- */
const links = new Map([...document.querySelectorAll(".bar ul a")].map((a) => [a.getAttribute("href").slice(1), a]));
const observer = new IntersectionObserver((entries) => {
  for (const entry of entries.filter((item) => item.isIntersecting)) {
    for (const link of links.values()) link.removeAttribute("aria-current");
    links.get(entry.target.id)?.setAttribute("aria-current", "true");
  }
}, { rootMargin: "-20% 0px -70% 0px" });
for (const section of document.querySelectorAll("section[id]")) observer.observe(section);

/* -- print ------------------------------------------------------------------------------------------------ */
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  for (const item of opened) item.open = true;
});
addEventListener("afterprint", () => { for (const item of opened) item.open = false; });

/* -- a served page follows its runs ----------------------------------------------------------------------- */
const PLACE = "slotlab-place";

async function follow() {
  const badge = document.getElementById("live");
  let seen = null;
  for (;;) {
    try {
      const state = await (await fetch("state", { cache: "no-store" })).json();
      badge.classList.remove("lost");
      badge.textContent = state.message;
      if (seen && state.page !== seen.page) {
        keep(() => sessionStorage, PLACE, JSON.stringify({ y: scrollY, view, frames: cards.map((card) => card.t) }));
        location.reload();
        return;
      }
      if (seen && state.training !== seen.training) {
        document.getElementById("training-body").innerHTML = await (await fetch("training", { cache: "no-store" })).text();
      }
      seen = state;
    } catch {
      badge.classList.add("lost");
      badge.textContent = "server stopped";
    }
    await new Promise((done) => setTimeout(done, 1500));
  }
}

function restore() {
  const place = JSON.parse(kept(() => sessionStorage, PLACE) ?? "null");
  keep(() => sessionStorage, PLACE, "null");
  if (!place) return;
  view.together = place.view.together;
  view.boundaries = place.view.boundaries;
  if (boundaries) boundaries.checked = view.boundaries;
  const together = document.getElementById("together");
  if (together) together.checked = view.together;
  setMode(place.view.mode);
  setColours(place.view.colours);
  cards.forEach((card, n) => { if (card.slider) card.slider.value = Math.min(place.frames[n] ?? 0, card.frames.length - 1); });
  scrollTo({ top: place.y, behavior: "instant" });
}

(async () => {
  setColours(view.colours);
  if (document.documentElement.hasAttribute("data-live")) { restore(); follow(); }
  for (const card of cards) await card.load();
  document.documentElement.dataset.ready = "";
})();
