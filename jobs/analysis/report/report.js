"use strict";
// Text of a run reaches the page through textContent and fillText alone.

const data = JSON.parse(document.getElementById("data").textContent);
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

function table(head, rows, numeric) {
  const made = element("table"), header = element("tr");
  head.forEach((text, column) => header.append(element("th", text, numeric.includes(column) ? "number" : "")));
  made.append(header);
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

// One view of the time axis for all plots: the wheel zooms, dragging moves, a double click shows everything again.
class View {
  constructor(from, to) {
    this.whole = [from, Math.max(to, from + 1e-3)];
    this.reset();
    this.plots = [];
    this.waiting = false;
  }

  reset() { [this.from, this.to] = this.whole; }

  zoom(at, factor) {
    const width = Math.min(Math.max((this.to - this.from) * factor, 1e-2), this.whole[1] - this.whole[0]);
    const share = (at - this.from) / (this.to - this.from);
    this.move(at - share * width, width);
  }

  move(from, width = this.to - this.from) {
    this.from = Math.min(Math.max(from, this.whole[0]), this.whole[1] - width);
    this.to = this.from + width;
    this.redraw();
  }

  redraw() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => { this.waiting = false; this.plots.forEach((plot) => plot.draw()); });
  }
}

class Plot {
  constructor(parent, view, height, paint, describe) {
    Object.assign(this, { view, height, paint, describe, rows: [0, 1] });
    this.canvas = element("canvas");
    this.canvas.style.height = `${height}px`;
    this.readout = element("p", "\u00a0", "readout");
    parent.append(this.canvas, this.readout);
    this.listen();
    view.plots.push(this);
  }

  get inner() { return { width: this.width - LEFT - RIGHT, height: this.height - TOP - BOTTOM }; }
  x(time) { return LEFT + (time - this.view.from) / (this.view.to - this.view.from) * this.inner.width; }
  time(x) { return this.view.from + (x - LEFT) / this.inner.width * (this.view.to - this.view.from); }
  y(share) { return TOP + (1 - share) * this.inner.height; }

  listen() {
    let dragged = null;
    const place = (event) => {
      const box = this.canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    this.canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      const [x, y] = place(event), factor = event.deltaY > 0 ? 1.25 : 0.8;
      if (event.shiftKey && this.zoomRows) this.zoomRows((y - TOP) / this.inner.height, factor);
      else this.view.zoom(this.time(x), factor);
    }, { passive: false });
    this.canvas.addEventListener("pointerdown", (event) => {
      dragged = [...place(event), this.view.from];
      this.canvas.setPointerCapture(event.pointerId);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      const [x, y] = place(event);
      if (dragged) {
        const width = this.view.to - this.view.from;
        if (this.moveRows) this.moveRows((y - dragged[1]) / this.inner.height);
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
    const pen = this.pen = this.canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.save();
    pen.beginPath();
    pen.rect(LEFT, TOP, this.inner.width, this.inner.height);
    pen.clip();
    this.top = this.paint(this, pen);
    pen.restore();
    this.axes(pen);
  }

  axes(pen) {
    const { width, height } = this.inner;
    pen.strokeStyle = COLORS.line;
    pen.strokeRect(LEFT + 0.5, TOP + 0.5, width, height);
    pen.fillStyle = COLORS.faint;
    pen.font = "11px system-ui, sans-serif";
    pen.textAlign = "center";
    const span = this.view.to - this.view.from, step = niceStep(span / 8);
    for (let t = Math.ceil(this.view.from / step) * step; t <= this.view.to; t += step) {
      pen.fillRect(this.x(t), TOP + height, 1, 4);
      pen.fillText(span < 50 ? `${number(t, 2)} ms` : seconds(t), this.x(t), TOP + height + 15);
    }
    pen.textAlign = "right";
    for (const [share, text] of this.top || []) pen.fillText(text, LEFT - 6, this.y(share) + 4);
  }
}

function niceStep(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return [1, 2, 5, 10].map((n) => n * power).find((n) => n >= least);
}

const scale = (top, unit = "") => [[0, "0"], [0.5, number(top / 2) + unit], [1, number(top) + unit]];
const most = (values) => values.reduce((a, b) => Math.max(a, b), 0);

// Steps

const stepAt = (steps, time) => {
  let low = 0, high = steps.end.length;
  while (low < high) { const mid = (low + high) >> 1; if (steps.end[mid] < time) low = mid + 1; else high = mid; }
  return Math.min(low, steps.end.length - 1);
};

function visible(steps, view) {
  const first = Math.max(stepAt(steps, view.from) - 1, 0), last = Math.min(stepAt(steps, view.to) + 1, steps.end.length - 1);
  return [first, last];
}

function highest(steps, view, values) {
  const [first, last] = visible(steps, view);
  return most(values.slice(first, last + 1));
}

// From the end of the mark before, so that steps that overlap share the time between them.
const begin = (steps, i) => (i ? Math.max(steps.end[i - 1], Math.min(steps.start[i], steps.end[i])) : steps.start[i]);

function columns(plot, pen, steps, stacks, top) {
  const [first, last] = visible(steps, plot.view);
  for (let i = first; i <= last; i++) {
    const x = plot.x(begin(steps, i)), width = Math.max(plot.x(steps.end[i]) - x, 0.6);
    let height = 0;
    for (const [values, color] of stacks) {
      const value = values[i] / top;
      if (value > 0) {
        pen.fillStyle = typeof color === "function" ? color(i) : color;
        pen.fillRect(x, plot.y(height + value), width, value * plot.inner.height);
      }
      height += value;
    }
  }
}

function line(plot, pen, steps, values, color, top) {
  const [first, last] = visible(steps, plot.view);
  pen.strokeStyle = color;
  pen.lineWidth = 1.2;
  pen.beginPath();
  for (let i = first; i <= last; i++) {
    pen.lineTo(plot.x(begin(steps, i)), plot.y(values[i] / top));
    pen.lineTo(plot.x(steps.end[i]), plot.y(values[i] / top));
  }
  pen.stroke();
}

function drawSteps(view, steps) {
  const phases = ["prefill", "mixed", "decode"];
  const about = steps.each > 1 ? `Each mark stands for ${steps.each} steps that follow one another: their mean, and the phase of most of them. ` : "";
  const describe = (time) => {
    const i = stepAt(steps, time);
    const named = steps.each > 1 ? `steps ${steps.first[i]} to ${steps.first[i] + steps.each - 1}` : `step ${steps.first[i]}`;
    const halves = steps.halves[i] ? `, ${steps.each > 1 ? `${steps.halves[i]} ` : ""}in halves` : "";
    return `${seconds(time)}: ${named}, ${phases[steps.phase[i]]}${halves}, batch ${number(steps.batch[i])}, waiting ${number(steps.waiting[i])}, ` +
      `${number(steps.prefill[i])} prompt tokens, ${number(steps.sampled[i])} sampled, ${number(steps.padding[i])} padding, ` +
      `forward ${number(steps.forward[i], 3)} ms, host ${number(steps.host[i], 3)} ms, KV ${number(steps.used[i])} used, ` +
      `${number(steps.cached[i])} cached${steps.preempted[i] ? `, ${number(steps.preempted[i])} preempted` : ""}`;
  };
  const batch = section("Steps: batch", `${about}Wheel zooms, dragging moves, a double click shows everything. Red: preemptions.`);
  legend(batch, [...phases.map((name) => [name, COLORS[name]]), ["waiting rows", COLORS.ink]]);
  const top = Math.max(most(steps.batch), most(steps.waiting), 1);
  new Plot(batch, view, 170, (plot, pen) => {
    columns(plot, pen, steps, [[steps.batch, (i) => COLORS[phases[steps.phase[i]]]]], top);
    line(plot, pen, steps, steps.waiting, COLORS.ink, top);
    pen.fillStyle = COLORS.preempted;
    const [first, last] = visible(steps, view);
    for (let i = first; i <= last; i++) if (steps.preempted[i]) pen.fillRect(plot.x(steps.end[i]) - 1, TOP, 2, 8);
    return scale(top);
  }, describe);
  const tokens = section("Steps: tokens", steps.each > 1 ? "Sums over the steps of a mark." : "");
  legend(tokens, [["prompt", COLORS.prefill], ["sampled", COLORS.sampled], ["padding", COLORS.padding]]);
  const all = steps.prefill.map((value, i) => value + steps.sampled[i] + steps.padding[i]);
  new Plot(tokens, view, 140, (plot, pen) => {
    const tokenTop = Math.max(highest(steps, view, all), 1);
    columns(plot, pen, steps, [[steps.sampled, COLORS.sampled], [steps.prefill, COLORS.prefill], [steps.padding, COLORS.padding]], tokenTop);
    return scale(tokenTop);
  }, describe);
  const times = section("Steps: time", `Forward on the device, and the host's work for the step, which may run beside it.${steps.each > 1 ? " Sums over the steps of a mark." : ""}`);
  legend(times, [["forward", COLORS.forward], ["host", COLORS.host]]);
  new Plot(times, view, 140, (plot, pen) => {
    const timeTop = Math.max(highest(steps, view, steps.forward), highest(steps, view, steps.host), 1e-3);
    line(plot, pen, steps, steps.forward, COLORS.forward, timeTop);
    line(plot, pen, steps, steps.host, COLORS.host, timeTop);
    return scale(timeTop, " ms");
  }, describe);
  if (!data.num_blocks) return;
  const blocks = section("KV blocks", `${number(data.num_blocks)} blocks; cached ones are free and hold a prefix that can be reused.`);
  legend(blocks, [["in use", COLORS.used], ["cached", COLORS.cached], ["free", COLORS.free]]);
  const free = steps.used.map((value, i) => Math.max(data.num_blocks - value - steps.cached[i], 0));
  new Plot(blocks, view, 140, (plot, pen) => {
    columns(plot, pen, steps, [[steps.used, COLORS.used], [steps.cached, COLORS.cached], [free, COLORS.free]], data.num_blocks);
    return scale(data.num_blocks);
  }, describe);
}

// Rows

function drawRows(view, rows) {
  const packed = bytes(rows.pieces), pieces = new Int32Array(packed.buffer), count = rows.row.length;
  const made = section("Rows", `${rows.each > 1 ? `Every ${rows.each}th row is drawn. ` : ""}One line a row, in order of arrival; shift and wheel zoom the lines.`);
  legend(made, rows.kinds.map((name) => [name, COLORS[name]]));
  const plot = new Plot(made, view, 420, (self, pen) => {
    const [low, high] = self.rows.map((share) => share * count), size = self.inner.height / Math.max(high - low, 1e-9);
    for (let i = 0; i < pieces.length; i += 4) {
      const row = pieces[i], start = pieces[i + 2] / 1000, end = start + pieces[i + 3] / 1000;
      if (row < low - 1 || row > high || end < view.from || start > view.to) continue;
      pen.fillStyle = COLORS[rows.kinds[pieces[i + 1]]];
      const x = self.x(start);
      pen.fillRect(x, TOP + (row - low) * size, Math.max(self.x(end) - x, 0.4), Math.max(size * 0.86, 0.5));
    }
    return [[1, number(low, 0)], [0, number(high, 0)]];
  }, (time, share) => {
    const line = Math.floor((plot.rows[0] + share * (plot.rows[1] - plot.rows[0])) * count);
    if (line < 0 || line >= count) return "";
    return `${seconds(time)}: row ${rows.row[line]}, ${rows.id[line]}, ${number(rows.prompt[line])} tokens in, ${number(rows.output[line])} out`;
  });
  const keep = (low, width) => {
    const from = Math.min(Math.max(low, 0), 1 - width);
    plot.rows = [from, from + width];
    view.redraw();
  };
  plot.zoomRows = (share, factor) => {
    const width = plot.rows[1] - plot.rows[0], next = Math.min(Math.max(width * factor, 4 / Math.max(count, 4)), 1);
    keep(plot.rows[0] + share * (width - next), next);
  };
  plot.moveRows = (share) => keep(plot.rows[0] - share * (plot.rows[1] - plot.rows[0]), plot.rows[1] - plot.rows[0]);
}

function drawBlocks(view, blocks) {
  const used = bytes(blocks.used), cached = bytes(blocks.cached);
  const picture = document.createElement("canvas");
  [picture.width, picture.height] = [blocks.columns, blocks.lines];
  const pen = picture.getContext("2d"), image = pen.createImageData(blocks.columns, blocks.lines);
  for (let i = 0; i < used.length; i++) {
    const u = used[i] / 100, c = cached[i] / 100, f = 1 - u - c;
    [[74, 143, 238], [125, 199, 241], [189, 154, 245]].forEach(([a, b, d], k) => { image.data[4 * i + k] = a * u + b * c + d * f; });
    image.data[4 * i + 3] = 255;
  }
  pen.putImageData(image, 0, 0);
  const per = blocks.lines > 1 ? blocks.first[1] - blocks.first[0] : data.num_blocks;
  const note = `${blocks.columns} instants; a line is ${per > 1 ? `${number(per)} blocks` : "one block"}` +
    (blocks.stride > 1 ? `, of which every ${blocks.stride}th was looked at.` : ".");
  const made = section("Block map", note);
  legend(made, [["in use", COLORS.used], ["cached", COLORS.cached], ["free", COLORS.free]]);
  const spacing = (blocks.end - blocks.start) / Math.max(blocks.columns - 1, 1);
  new Plot(made, view, 280, (plot, target) => {
    target.imageSmoothingEnabled = false;
    const left = plot.x(blocks.start - spacing), right = plot.x(blocks.end);
    target.drawImage(picture, left, TOP, right - left, plot.inner.height);
    return [[1, "0"], [0, number(data.num_blocks)]];
  }, (time, share) => {
    const column = Math.ceil((time - blocks.start) / spacing), row = Math.floor(share * blocks.lines);
    if (column < 0 || column >= blocks.columns || row < 0 || row >= blocks.lines) return "";
    const i = row * blocks.columns + column;
    return `${seconds(time)}: blocks from ${blocks.first[row]}: ${used[i]} % in use, ${cached[i]} % cached`;
  });
}

function drawLatencies(latencies) {
  const made = section("Latencies", "Bins grow by a constant factor."), grid = element("div", undefined, "columns");
  made.append(grid);
  for (const found of latencies) {
    const part = element("div"), text = found.percentiles.map(([q, ms]) => `p${q} ${number(ms)} ms`).join(", ");
    part.append(element("p", `${found.title}: ${text || "none"}`));
    const canvas = element("canvas");
    canvas.style.height = "120px";
    part.append(canvas);
    grid.append(part);
    const width = canvas.clientWidth || 340, ratio = window.devicePixelRatio || 1, pen = canvas.getContext("2d");
    [canvas.width, canvas.height] = [width * ratio, 120 * ratio];
    pen.scale(ratio, ratio);
    pen.font = "11px system-ui, sans-serif";
    const top = Math.max(most(found.counts), 1), size = width / Math.max(found.counts.length, 1);
    found.counts.forEach((count, i) => {
      pen.fillStyle = COLORS.decode;
      pen.fillRect(i * size, 100 - count / top * 96, Math.max(size - 1, 1), count / top * 96);
      if (i % 12 === 0) { pen.fillStyle = COLORS.faint; pen.fillText(`${number(found.edges[i])} ms`, i * size, 115); }
    });
  }
}

function drawRun() {
  root.append(element("h1", data.name), element("p", [data.status, data.note].filter(Boolean).join("; "), "faint"));
  const facts = section("The run");
  facts.append(table(["", ""], data.facts, []));
  if (data.findings.length) {
    const made = section("Findings"), list = element("ol");
    for (const [text, evidence] of data.findings) {
      const item = element("li", text);
      item.append(element("p", evidence, "faint"));
      list.append(item);
    }
    made.append(list);
  }
  const wall = data.ledger.reduce((sum, [, ms]) => sum + ms, 0) || 1, ledger = section(`Wall time: ${seconds(wall)}`);
  ledger.append(table(["", "time", "share", "", ""], data.ledger.map(([place, ms, meaning]) =>
    [place, seconds(ms), `${number(ms / wall * 100, 1)} %`, bar(ms / wall), meaning]), [1, 2]));
  if (data.steps) {
    const ends = data.steps.end, view = new View(data.steps.start[0], most(ends));
    drawSteps(view, data.steps);
    drawRows(view, data.rows);
    if (data.blocks) drawBlocks(view, data.blocks);
    view.plots.forEach((plot) => plot.draw());
    window.addEventListener("resize", () => view.redraw());
    drawLatencies(data.latencies);
    drawPrefixes(data.prefixes);
    section("Slowest rows").append(table(["row", "sample", "id", "time", "queued", "because"],
      data.slow.map(([row, sample, id, ms, queued, reason]) => [row, sample, id, seconds(ms), seconds(queued), reason]), [0, 1, 3, 4]));
  }
  section("Configuration", data.command).append(table(["key", "value"], data.config, []));
}

function drawPrefixes(prefixes) {
  if (!prefixes || !prefixes.uses.length) return;
  const made = section("Hit rate by prefix", `Rows that begin with the same block; ${number(prefixes.uses.length)} of ${number(prefixes.total)} such prefixes, those of most rows.`);
  made.append(table(["hash", "first row", "rows", "prompt tokens", "cached", "rate", ""], prefixes.uses.map(
    ([hash, row, count, prompt, cached]) => [hash, row, number(count), number(prompt), number(cached),
      `${number(cached / Math.max(prompt, 1) * 100, 1)} %`, bar(cached / Math.max(prompt, 1), COLORS.cached)]), [1, 2, 3, 4, 5]));
}

function drawSweep() {
  root.append(element("h1", data.name), element("p", `${data.runs.length} runs`, "faint"));
  const head = ["run", ...data.deltas.map(([key]) => key), ...data.figures.map(([title]) => title), "status"];
  const rows = data.runs.map(([, status], i) => [i + 1, ...data.deltas.map(([, values]) => values[i]),
    ...data.figures.map(([, values]) => number(values[i])), status]);
  section("What differs, and what came out").append(table(head, rows, head.map((_, i) => i).slice(1 + data.deltas.length, -1)));
  const grid = element("div", undefined, "columns");
  section("Figures").append(grid);
  for (const [title, values] of data.figures) {
    const part = element("div"), top = Math.max(most(values.map((value) => value || 0)), 1e-12);
    part.append(element("p", title), table(["run", "", ""], values.map((value, i) => [i + 1, number(value), bar((value || 0) / top)]), [1]));
    grid.append(part);
  }
  const shares = data.ledgers.map((places, i) => {
    const wall = places.reduce((a, b) => a + b, 0) || 1;
    return [i + 1, ...places.map((ms) => `${number(ms / wall * 100, 1)} %`)];
  });
  section("Share of the wall time").append(table(["run", ...data.places], shares, data.places.map((_, i) => i + 1)));
  section("Runs").append(table(["", "directory"], data.runs.map(([name], i) => [i + 1, name]), []));
}

if (data.kind === "run") drawRun(); else drawSweep();
document.documentElement.dataset.drawn = "true";
