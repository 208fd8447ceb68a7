// -- charts ------------------------------------------------------------------------------------------------------------
const GUTTER = 46;
const LINES = 4;         // most lines of the grid
const shown = { view: null, pointed: null };  // the column that the pointer is at, or null
const charts = [];

// The next round number up, and the distance of the lines of the grid.
function rounded(most, unit = 1) {
  const scaled = most / unit, power = 10 ** Math.floor(Math.log10(scaled / LINES || 1));
  const step = [1, 2, 5, 10].map(one => one * power).find(one => scaled / one <= LINES) || 10 * power;
  return [Math.ceil(scaled / step - 1e-9) * step * unit, step * unit];
}
function unitOf(n) { let unit = 1; while (n >= 1024 * unit) unit *= 1024; return unit; }

class Chart {
  // lines: function of the view that gives [{values, kind: area, line, bars or strip, classes}], the one at the back first.
  // format: writes a value. least: the axis reaches at least this. high: values above it are drawn as bad. log: of a
  // logarithmic axis. small: without an axis, for a tile. axis: whether times stand below it.
  constructor(id, options) {
    Object.assign(this, { height: 62, gutter: GUTTER, least: 1, format: few, unit: () => 1 }, options);
    this.svg = at(id);
    charts.push(this);
    if (this.small) { this.gutter = 0; listen(this.svg); }
  }

  draw(view) {
    const width = this.svg.clientWidth, top = this.small ? 9 : this.room || 8, below = this.axis ? 20 : this.small ? 0 : 4;
    if (!width) return;
    this.height = this.small ? 54 : this.height;
    const total = this.height + (this.small ? 0 : top + below), bottom = this.small ? total - 1 : top + this.height;
    if (!this.small) this.svg.style.height = total + "px";
    this.svg.setAttribute("viewBox", `0 0 ${width} ${total}`);
    const across = width - this.gutter, each = across / view.count, x = i => this.gutter + (i + 0.5) * each;
    const lines = this.lines(view), found = lines.flatMap(one => one.values.filter(isFinite)), most = Math.max(this.least, ...found);
    const parts = [];
    let y;
    if (this.log) {
      const positive = found.filter(value => value > 0);
      const low = Math.floor(Math.log10(positive.length ? Math.min(...positive) : 0.001)), high = Math.max(low + 1, Math.ceil(Math.log10(positive.length ? Math.max(...positive) : 1) - 1e-9));
      y = value => bottom - (bottom - top) * (Math.log10(value) - low) / (high - low);
      for (let power = low; power <= high; power++) this.rule(parts, y(10 ** power), width, power === low, this.format(10 ** power));
    } else if (this.strip) {
      y = () => top;
    } else {
      const [limit, step] = rounded(most, this.unit(most));
      y = value => bottom - (bottom - top) * value / limit;
      if (this.small) parts.push(draw("line", { class: "base", x1: 0, x2: width, y1: bottom, y2: bottom }), draw("text", { class: "end", x: width, y: 7 }, found.length ? "most " + this.format(Math.max(...found)) : ""));
      else for (let value = 0; value <= limit * 1.001; value += step) this.rule(parts, y(value), width, value === 0, this.format(value));
    }
    for (const one of lines) parts.push(...this.line(one, view, x, y, each, bottom, top));
    if (this.events) parts.push(...marks(view, x, bottom, top));
    if (this.axis) parts.push(...times(view, x, bottom, width));
    if (shown.pointed !== null) {
      const i = shown.pointed - view.first;
      if (i >= 0 && i < view.count) {
        parts.push(draw("line", { class: "cursor", x1: x(i), x2: x(i), y1: this.strip ? 0 : top - 4, y2: bottom + 3 }));
        for (const one of lines) if (one.kind !== "bars" && one.kind !== "strip" && isFinite(one.values[i])) parts.push(draw("circle", { class: "dot", cx: x(i), cy: y(one.values[i]), r: 3 }));
      }
    }
    this.svg.replaceChildren(...parts);
  }

  rule(parts, y, width, base, label) {
    parts.push(draw("line", { class: base ? "base" : "grid", x1: this.gutter, x2: width, y1: Math.round(y), y2: Math.round(y) }));
    parts.push(draw("text", { class: "end", x: this.gutter - 7, y: y + 4 }, label));
  }

  line(one, view, x, y, each, bottom, top) {
    if (one.kind === "strip") return strip(one.values, x, each, top, this.height);
    if (one.kind === "bars") {
      const gap = each > 4 ? 1 : 0;
      const path = one.values.map((value, i) => value > 0 ? `M${(x(i) - each / 2).toFixed(1)},${y(one.from ? one.from[i] || 0 : 0).toFixed(1)}V${Math.min(y(one.from ? one.from[i] || 0 : 0) - 2, y(value)).toFixed(1)}h${(each - gap).toFixed(1)}V${y(one.from ? one.from[i] || 0 : 0).toFixed(1)}Z` : "").join("");
      return [draw("path", { class: one.classes, d: path })];
    }
    // Pieces between what is not known.
    const parts = [];
    let piece = [];
    const end = () => {
      if (!piece.length) return;
      const points = piece.map(i => `${x(i).toFixed(1)},${y(one.values[i]).toFixed(1)}`).join("L");
      const first = x(piece[0]).toFixed(1), last = x(piece[piece.length - 1]).toFixed(1);
      if (one.kind === "area") parts.push(draw("path", { class: "area", d: `M${first},${bottom}L${points}L${last},${bottom}Z` }));
      parts.push(draw("path", { class: "curve " + (one.classes || ""), d: piece.length > 1 ? "M" + points : `M${points}h.1` }));
      piece = [];
    };
    one.values.forEach((value, i) => { if (isFinite(value) && !(this.log && value <= 0)) piece.push(i); else if (!one.bridges) end(); });
    end();
    if (this.high !== undefined) {
      const bad = one.values.map(value => value > this.high ? value : 0);
      if (one.kind === "area") parts.push(...this.line({ values: bad, kind: "bars", classes: "bad-bars" }, view, x, y, each, bottom, top));
    }
    return parts;
  }
}

// The condition of each column, neighbours of one condition together.
function strip(tones, x, each, top, height) {
  const parts = [];
  for (let i = 0; i < tones.length;) {
    let end = i;
    while (end < tones.length && tones[end] === tones[i]) end++;
    parts.push(draw("rect", { class: tones[i] + "-bars", x: (x(i) - each / 2).toFixed(1), y: top, width: ((end - i) * each + 0.3).toFixed(1), height, rx: end - i > 2 ? 1.5 : 0 }));
    i = end;
  }
  return parts;
}

const EVENTS = { died: "worker died", reloaded: "reload", started: "start" };
function marks(view, x, bottom, top) {
  const parts = [];
  const free = [0, 0];   // two rows of words
  for (let i = 0; i < view.count; i++) {
    const names = Object.keys(EVENTS).filter(name => view.columns(name)[i] > 0 && !(view.columns(name)[i - 1] > 0));
    if (!names.length) continue;
    parts.push(draw("line", { class: "event", x1: x(i), x2: x(i), y1: top, y2: bottom }));
    const text = EVENTS[names[0]], room = 6.2 * text.length + 8, left = x(i) + room > x(view.count - 1);
    const row = free.findIndex(one => (left ? x(i) - room : x(i)) >= one);
    if (row >= 0) {
      parts.push(draw("text", { class: left ? "end word" : "word", x: x(i) + (left ? -4 : 4), y: top + 9 + 13 * row }, text));
      free[row] = (left ? x(i) : x(i) + room) + 4;
    }
  }
  return parts;
}

function times(view, x, bottom, width) {
  const { range } = view, step = width < 560 ? range.seldom : range.tick, parts = [];
  const begin = view.time(0), shift = 60 * new Date(1000 * begin).getTimezoneOffset();  // round hours of here
  const each = view.seconds();
  for (let moment = Math.ceil((begin - shift) / step) * step + shift; moment < view.time(view.count); moment += step) {
    const place = x((moment - begin) / each - 0.5);
    if (place < GUTTER + 12 || place > width - 14) continue;
    parts.push(draw("line", { class: "base", x1: place, x2: place, y1: bottom, y2: bottom + 4 }), draw("text", { class: "middle", x: place, y: bottom + 16 }, clock(moment)));
  }
  return parts;
}

// -- the pointer: all charts show the same moment ----------------------------------------------------------------------
function point(column) {
  if (column === shown.pointed) return;
  shown.pointed = column;
  drawCharts();
}
function listen(node) {
  const gutter = () => node.tagName === "svg" ? 0 : GUTTER;
  const move = event => {
    if (!shown.view) return;
    const box = node.getBoundingClientRect(), across = box.width - gutter();
    const i = Math.floor((event.clientX - box.left - gutter()) / across * shown.view.count);
    point(shown.view.first + Math.max(0, Math.min(shown.view.count - 1, i)));
  };
  node.addEventListener("pointermove", move);
  node.addEventListener("pointerdown", move);
  node.addEventListener("pointerleave", () => point(null));
}
function steer(node) {
  node.addEventListener("keydown", event => {
    const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
    if (event.key === "Escape") point(null);
    else if (step && shown.view) {
      event.preventDefault();
      const { first, end } = shown.view;
      point(Math.max(first, Math.min(end, (shown.pointed === null ? end : shown.pointed) + step)));
    }
  });
  node.addEventListener("blur", () => point(null));
}
for (const id of ["traffic", "latency"]) { listen(at(id)); steer(at(id)); }

function tip(id, rows, reasons = []) {
  const node = at(id), view = shown.view, i = shown.pointed === null ? -1 : shown.pointed - view.first;
  node.hidden = !(i >= 0 && i < view.count);
  if (node.hidden) return;
  const list = make("dl");
  for (const [name, value, key] of rows(i)) {
    const term = make("dt");
    if (key) term.append(make("i", undefined, "key " + key));
    term.append(name);
    list.append(term, make("dd", value));
  }
  const from = view.time(i), words = view.past.step === 60 ? `${clock(from)} – ${clock(from + view.seconds())}` : `${clock(from, true)} – ${clock(from + view.seconds(), true)}`;
  node.replaceChildren(make("strong", words), list, ...reasons.map(([tone, text]) => make("p", text, tone)));
  const across = node.parentNode.clientWidth - GUTTER, x = GUTTER + (i + 0.5) * across / view.count;
  const right = x > GUTTER + across / 2;
  node.style.left = right ? "" : Math.round(x + 14) + "px";
  node.style.right = right ? Math.round(node.parentNode.clientWidth - x + 14) + "px" : "";
}

// -- the charts of this page -------------------------------------------------------------------------------------------
const amount = n => bytes(n).join(" ");
new Chart("requests-chart", { height: 150, events: true, format: few, lines: view => [{ values: view.requests(), kind: "area" }] });
new Chart("errors-chart", {
  height: 54, room: 16, least: 0.1, format: few, lines: view => {
    const faults = view.added(FAULTS), all = view.added([...FAULTS, ...OF_CLIENTS]);
    return [{ values: all.map((value, i) => value > faults[i] ? value : 0), from: faults, kind: "bars", classes: "client-bars" }, { values: faults, kind: "bars", classes: "fault-bars" }];
  },
});
new Chart("health-chart", { height: 10, strip: true, axis: true, lines: view => [{ values: conditions(view).map(one => one.tone), kind: "strip" }] });
new Chart("latency-chart", {
  height: 130, log: true, axis: true, format: span, lines: view => ["p99", "p95", "p50"].map(name => ({ values: view.percentiles()[name], kind: "line", classes: name })),
});
const TILES = {
  active: { lines: view => [{ values: view.columns("active"), kind: "area" }, { values: view.columns("idle"), kind: "line", classes: "second" }], format: whole },
  accepts: { series: "accepted", format: perSecond },
  pool: {
    lines: view => [{ values: isFinite(view.past.recent("pool_used")) ? view.columns("pool_used") : view.columns("handlers"), kind: "area" }],
    format: n => isFinite(SECONDS.recent("pool_used")) ? percent(n) : whole(n), high: 0.9,
  },
  lag: { series: "lag", format: span, least: 0.001, high: 0.25 },
  cpu: { series: "cpu", format: percent, least: 0.1 },
  memory: { series: "memory", format: amount },
  received: { series: "bytes_received", format: n => amount(n) + "/s" },
  sent: { series: "bytes_sent", format: n => amount(n) + "/s" },
};
for (const [id, { series, ...options }] of Object.entries(TILES)) {
  const lines = options.lines || (view => [{ values: view.columns(series), kind: "area" }]);
  TILES[id].chart = new Chart(id + "-chart", { small: true, ...options, lines });
}

function drawCharts() {
  const { view } = shown;
  if (!view) return;
  for (const chart of charts) chart.draw(view);
  const i = shown.pointed === null ? -1 : shown.pointed - view.first, inside = i >= 0 && i < view.count;
  for (const [id, { chart }] of Object.entries(TILES)) {
    say(id + "-at", inside ? chart.format(chart.lines(view)[0].values[i]) : "");
  }
  tip("traffic-tip", i => [
    ["requests", perSecond(view.requests()[i]), "request"],
    ["faults", perSecond(view.added(FAULTS)[i]), "fault"],
    ["of clients", perSecond(view.added(OF_CLIENTS)[i]), "client"],
    ["connections", whole(view.columns("active")[i])],
  ], inside ? conditions(view)[i].reasons : []);
  tip("latency-tip", i => ["p50", "p95", "p99"].map(name => [name, span(view.percentiles()[name][i]), name]));
}
