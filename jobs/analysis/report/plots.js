"use strict";
// Tables and zoomable plots. Text of a run reaches the page through textContent and fillText alone.

const root = document.getElementById("report");
const COLORS = {
  prefill: "#d98032", mixed: "#b05fa6", decode: "#4a7dbd", waiting: "#c9ced7", preempted: "#cc3d3d", sampled: "#4a7dbd",
  padding: "#b9bfc9", forward: "#4a7dbd", host: "#d98032", used: "#4a7dbd",
  cached: "#8fc79a", free: "#eef1f5", ink: "#1d2430", faint: "#6b7484", line: "#d9dee6",
};
const LEFT = 58, RIGHT = 10, TOP = 6, BOTTOM = 20;

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function section(title, note) {
  const made = element("section");
  made.append(element("h2", title));
  if (note) made.append(element("p", note, "faint"));
  root.append(made);
  return made;
}

function number(value, digits) {
  if (value === null || value === undefined || Number.isNaN(value)) return "-";
  const most = digits === undefined ? (Math.abs(value) >= 100 || Number.isInteger(value) ? 0 : 2) : digits;
  return value.toLocaleString("en", { maximumFractionDigits: most });
}

const seconds = (ms) => `${number(ms / 1000, 3)} s`;
// With as many digits as tell one from the next.
const milliseconds = (ms, step) => `${number(ms, Math.max(0, Math.ceil(-Math.log10(step))))} ms`;
const fixed = (value, digits) => value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const percent = (share) => `${fixed(share * 100, 1)} %`;

function table(head, rows, numeric) {
  const made = element("table"), header = element("tr");
  head.forEach((text, column) => {
    const cell = element("th", undefined, numeric.includes(column) ? "number" : "");
    // A key may be broken at its dots and underscores.
    for (const part of String(text).split(/(?<=[._])/)) cell.append(part, document.createElement("wbr"));
    header.append(cell);
  });
  if (head.some((text) => text)) made.append(header);
  for (const row of rows) {
    const line = element("tr");
    row.forEach((cell, column) => {
      if (cell instanceof Node) line.append(cell);
      else line.append(element("td", String(cell), numeric.includes(column) ? "number" : ""));
    });
    made.append(line);
  }
  return made;
}

function bar(share, color) {
  const cell = element("td", undefined, "bar"), filled = element("i");
  filled.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  if (color) filled.style.background = color;
  cell.append(filled);
  return cell;
}

function legend(parent, names) {
  const made = element("p", undefined, "legend");
  for (const [name, color] of names) {
    const entry = element("span"), box = element("i");
    box.style.background = color;
    entry.append(box, name);
    made.append(entry);
  }
  parent.append(made);
}

function bytes(text) {
  const raw = atob(text), made = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) made[i] = raw.charCodeAt(i);
  return made;
}

// One view of an axis, for all plots that share it: the wheel zooms, dragging moves, a double click shows everything.
class View {
  constructor(from, to) {
    this.whole = [from, Math.max(to, from + 1e-3)];
    this.reset();
    this.plots = [];
    this.waiting = false;
  }

  reset() { [this.from, this.to] = this.whole; }

  // This and the next two tell whether anything changed.
  zoom(at, factor) {
    const width = Math.max((this.to - this.from) * factor, this.least);
    if (width >= this.whole[1] - this.whole[0]) return this.show(...this.whole);
    const share = (at - this.from) / (this.to - this.from);
    return this.move(at - share * width, width);
  }

  move(from, width = this.to - this.from) {
    const first = Math.max(Math.min(from, this.whole[1] - width), this.whole[0]);
    return this.show(first, first + width);
  }

  show(from, to) {
    if (this.from === from && this.to === to) return false;
    [this.from, this.to] = [from, to];
    this.redraw();
    return true;
  }

  redraw() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => { this.waiting = false; this.draw(); });
  }

  draw() { this.plots.forEach((plot) => plot.draw()); }

  get least() { return 1e-2; }

  // [place, text] of the axis: milliseconds since the run's start.
  ticks() {
    const span = this.to - this.from, made = [], step = niceStep(span / 8);
    for (let t = Math.ceil(this.from / step) * step; t <= this.to; t += step) {
      made.push([t, span < 50 ? milliseconds(t, step) : seconds(t)]);
    }
    return made;
  }
}

// Bins whose edges grow by a constant factor: places are bins.
class BinView extends View {
  constructor(edges) {
    super(0, edges.length - 1);
    this.low = edges[0];
    this.growth = Math.log(edges[edges.length - 1] / edges[0]) / (edges.length - 1);
  }

  get least() { return 2; }
  value(place) { return this.low * Math.exp(place * this.growth); }

  ticks() {
    const low = this.value(this.from), high = this.value(this.to), made = [];
    const add = (v, step) => made.push([Math.log(v / this.low) / this.growth, milliseconds(v, step)]);
    if (high / low < 20) {
      const step = niceStep((high - low) / 4);
      for (let v = Math.ceil(low / step) * step; v <= high; v += step) add(v, step);
    } else {
      for (let v = 10 ** Math.ceil(Math.log10(low)); v <= high; v *= 10) add(v, v);
    }
    return made;
  }
}

// `paint` draws between the axes and returns [share of the height, text] of the left one; `describe` says what is at
// (place, share of the height from above). With `lines`, shift and wheel zoom into that many lines; without, into the
// lower part of the values, of which `reach` is shown.
class Plot {
  constructor(parent, view, height, paint, describe, lines = 0) {
    Object.assign(this, { view, height, paint, describe, lines, rows: [0, 1] });
    this.canvas = element("canvas");
    this.canvas.style.height = `${height}px`;
    this.readout = element("p", "\u00a0", "readout");
    parent.append(this.canvas, this.readout);
    this.listen();
    view.plots.push(this);
  }

  get inner() { return { width: this.width - LEFT - RIGHT, height: this.height - TOP - BOTTOM }; }
  get reach() { return this.rows[1] - this.rows[0]; }
  x(time) { return LEFT + (time - this.view.from) / (this.view.to - this.view.from) * this.inner.width; }
  time(x) { return this.view.from + (x - LEFT) / this.inner.width * (this.view.to - this.view.from); }
  y(share) { return TOP + (1 - share) * this.inner.height; }
  // Of the whole height, from above.
  line(share) { return this.rows[0] + share * this.reach; }

  zoomRows(share, factor) {
    const next = Math.min(Math.max(this.reach * factor, this.lines ? 4 / Math.max(this.lines, 4) : 1e-3), 1);
    return this.showRows(this.lines ? this.line(share) - share * next : 1 - next, next);
  }

  showRows(low, width) {
    const before = this.rows, from = Math.min(Math.max(low, 0), 1 - width);
    this.rows = [from, from + width];
    const changed = before[0] !== this.rows[0] || before[1] !== this.rows[1];
    if (changed) this.view.redraw();
    return changed;
  }

  listen() {
    let dragged = null;
    const place = (event) => {
      const box = this.canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    this.canvas.addEventListener("wheel", (event) => {
      // With shift, browsers report the wheel as horizontal. A trackpad sends many small parts of a wheel's notch.
      const moved = (event.deltaY || event.deltaX) / (event.deltaMode ? 3 : 100);
      const [x, y] = place(event), factor = 1.25 ** Math.max(-1, Math.min(1, moved));
      const changed = event.shiftKey ? this.zoomRows((y - TOP) / this.inner.height, factor) : this.view.zoom(this.time(x), factor);
      if (changed) event.preventDefault(); // else the page scrolls
    }, { passive: false });
    this.canvas.addEventListener("pointerdown", (event) => {
      dragged = [...place(event), this.view.from];
      this.canvas.setPointerCapture(event.pointerId);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      const [x, y] = place(event);
      if (dragged) {
        const width = this.view.to - this.view.from;
        if (this.lines) this.showRows(this.rows[0] - (y - dragged[1]) / this.inner.height * this.reach, this.reach);
        dragged[1] = y;
        this.view.move(dragged[2] - (x - dragged[0]) / this.inner.width * width);
      }
      this.readout.textContent = this.describe(this.time(x), (y - TOP) / this.inner.height) || "\u00a0";
    });
    for (const end of ["pointerup", "pointercancel"]) this.canvas.addEventListener(end, () => { dragged = null; });
    this.canvas.addEventListener("dblclick", () => { this.view.reset(); this.rows = [0, 1]; this.view.redraw(); });
  }

  draw() {
    const ratio = window.devicePixelRatio || 1;
    this.width = this.canvas.clientWidth || 1100;
    this.canvas.width = this.width * ratio;
    this.canvas.height = this.height * ratio;
    const pen = this.canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.save();
    pen.beginPath();
    pen.rect(LEFT, TOP, this.inner.width, this.inner.height);
    pen.clip();
    const left = this.paint(this, pen);
    pen.restore();
    this.axes(pen, left);
  }

  axes(pen, left) {
    const { width, height } = this.inner;
    pen.strokeStyle = COLORS.line;
    pen.strokeRect(LEFT + 0.5, TOP + 0.5, width, height);
    pen.fillStyle = COLORS.faint;
    pen.font = "11px system-ui, sans-serif";
    pen.textAlign = "center";
    for (const [at, text] of this.view.ticks()) {
      pen.fillRect(this.x(at), TOP + height, 1, 4);
      const half = pen.measureText(text).width / 2;
      pen.fillText(text, Math.min(this.x(at), this.width - half), TOP + height + 15);
    }
    pen.textAlign = "right";
    for (const [share, text] of left) pen.fillText(text, LEFT - 6, this.y(share) + 4);
  }
}

function niceStep(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return [1, 2, 5, 10].map((n) => n * power).find((n) => n >= least);
}

// Half a row or block is none.
const scale = (top, unit = "") => [[0, "0"], ...(unit || Number.isInteger(top / 2) ? [[0.5, number(top / 2) + unit]] : []), [1, number(top) + unit]];
const most = (values) => values.reduce((a, b) => Math.max(a, b), 0);
