"use strict";
// What a report shows. Text of a run reaches the page through textContent and fillText alone.

const data = JSON.parse(document.getElementById("data").textContent);

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
  const [first, last] = visible(steps, plot.view), ratio = window.devicePixelRatio || 1;
  // Whole pixels: edges within one, and gaps narrower than one, would shine through as stripes that no step has.
  for (let i = first; i <= last; i++) {
    const x = Math.floor(plot.x(begin(steps, i)) * ratio) / ratio;
    const width = Math.max(Math.ceil(plot.x(steps.end[i]) * ratio) / ratio - x, 1 / ratio);
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
  let before = -Infinity;
  for (let i = first; i <= last; i++) {
    const x = plot.x(begin(steps, i)), y = plot.y(values[i] / top);
    if (x - before > 4) pen.moveTo(x, y); // nothing ran: an attempt was loading
    else pen.lineTo(x, y);
    before = plot.x(steps.end[i]);
    pen.lineTo(before, y);
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
  section("Over time", `Times count from the run's start${data.paused ? `, without the ${seconds(data.paused)} between its attempts` : ""}. In each plot the wheel zooms into the time, shift and wheel upright; dragging moves; a double click shows everything; what is under the pointer is told below.`);
  const batch = section("Steps: rows in the batch", about);
  legend(batch, [...phases.map((name) => [name, COLORS[name]]), ["preemptions", COLORS.preempted]]);
  const top = Math.max(most(steps.batch), 1);
  new Plot(batch, view, 170, (plot, pen) => {
    const shown = top * plot.reach;
    columns(plot, pen, steps, [[steps.batch, (i) => COLORS[phases[steps.phase[i]]]]], shown);
    pen.fillStyle = COLORS.preempted;
    const [first, last] = visible(steps, view);
    for (let i = first; i <= last; i++) if (steps.preempted[i]) pen.fillRect(plot.x(steps.end[i]) - 1, TOP, 2, 8);
    return scale(shown);
  }, describe);
  const longest = Math.max(most(steps.waiting), 1);
  new Plot(section("Steps: rows that wait"), view, 90, (plot, pen) => {
    const shown = longest * plot.reach;
    columns(plot, pen, steps, [[steps.waiting, COLORS.waiting]], shown);
    return scale(shown);
  }, describe);
  const tokens = section("Steps: tokens", steps.each > 1 ? "Sums over the steps of a mark." : "");
  legend(tokens, [["prompt", COLORS.prefill], ["sampled", COLORS.sampled], ["padding", COLORS.padding]]);
  const all = steps.prefill.map((value, i) => value + steps.sampled[i] + steps.padding[i]);
  new Plot(tokens, view, 140, (plot, pen) => {
    const tokenTop = Math.max(highest(steps, view, all), 1) * plot.reach;
    columns(plot, pen, steps, [[steps.sampled, COLORS.sampled], [steps.prefill, COLORS.prefill], [steps.padding, COLORS.padding]], tokenTop);
    return scale(tokenTop);
  }, describe);
  const times = section("Steps: time taken", `Forward on the device, and the host's work for the step, which may run beside it.${steps.each > 1 ? " Sums over the steps of a mark." : ""}`);
  legend(times, [["forward", COLORS.forward], ["host", COLORS.host]]);
  new Plot(times, view, 140, (plot, pen) => {
    const timeTop = Math.max(highest(steps, view, steps.forward), highest(steps, view, steps.host), 1e-3) * plot.reach;
    line(plot, pen, steps, steps.forward, COLORS.forward, timeTop);
    line(plot, pen, steps, steps.host, COLORS.host, timeTop);
    return scale(timeTop, " ms");
  }, describe);
  if (!data.num_blocks) return;
  const blocks = section("KV blocks", `${number(data.num_blocks)} blocks; cached ones are free and hold a prefix that can be reused.`);
  legend(blocks, [["in use", COLORS.used], ["cached", COLORS.cached], ["free", COLORS.free]]);
  const free = steps.used.map((value, i) => Math.max(data.num_blocks - value - steps.cached[i], 0));
  new Plot(blocks, view, 140, (plot, pen) => {
    const shown = data.num_blocks * plot.reach;
    columns(plot, pen, steps, [[steps.used, COLORS.used], [steps.cached, COLORS.cached], [free, COLORS.free]], shown);
    return scale(shown);
  }, describe);
}

// Rows

function drawRows(view, rows) {
  const packed = bytes(rows.pieces), pieces = new Int32Array(packed.buffer), count = rows.row.length;
  const made = section("Rows", `${rows.each > 1 ? `One row in ${rows.each} is drawn. ` : ""}One line a row, in order of arrival.`);
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
    return [[1, number(low * rows.each, 0)], [0, number(high * rows.each, 0)]];
  }, (time, share) => {
    const line = Math.floor(plot.line(share) * count);
    if (line < 0 || line >= count) return "";
    return `${seconds(time)}: row ${rows.row[line]} (${rows.id[line]}), ${number(rows.prompt[line])} tokens in, ${number(rows.output[line])} out`;
  }, count);
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
  const note = `By block id, at ${blocks.columns} instants; a line is ${per > 1 ? `${number(per)} blocks` : "one block"}` +
    (blocks.stride > 1 ? `, one in ${blocks.stride} of which was looked at.` : ".");
  const made = section("Block map", note);
  legend(made, [["in use", COLORS.used], ["cached", COLORS.cached], ["free", COLORS.free]]);
  const spacing = (blocks.end - blocks.start) / Math.max(blocks.columns - 1, 1);
  const plot = new Plot(made, view, 280, (self, target) => {
    target.imageSmoothingEnabled = false;
    const left = self.x(blocks.start - spacing), right = self.x(blocks.end), [low, high] = self.rows;
    target.drawImage(picture, 0, low * blocks.lines, blocks.columns, self.reach * blocks.lines, left, TOP, right - left, self.inner.height);
    return [[1, number(low * data.num_blocks, 0)], [0, number(high * data.num_blocks, 0)]];
  }, (time, share) => {
    const column = Math.ceil((time - blocks.start) / spacing), row = Math.floor(plot.line(share) * blocks.lines);
    if (column < 0 || column >= blocks.columns || row < 0 || row >= blocks.lines) return "";
    const i = row * blocks.columns + column;
    return `${seconds(time)}: blocks from ${blocks.first[row]}: ${used[i]} % in use, ${cached[i]} % cached`;
  }, blocks.lines);
}

// A plot of its own axis for each.
function drawLatencies(latencies) {
  const made = section("Latencies", "Rows by the time that they took; bins grow by a constant factor."), grid = element("div", undefined, "columns");
  made.append(grid);
  return latencies.map((found) => {
    const part = element("div"), text = found.percentiles.map(([q, ms]) => `p${q} ${number(ms)} ms`).join(", ");
    part.append(element("p", found.title), element("p", text || "none", "faint"));
    grid.append(part);
    if (!found.counts.length) return null;
    const view = new BinView(found.edges), top = Math.max(most(found.counts), 1);
    new Plot(part, view, 150, (plot, pen) => {
      pen.fillStyle = COLORS.decode;
      found.counts.forEach((count, i) => {
        const height = count / (top * plot.reach) * plot.inner.height, x = plot.x(i);
        pen.fillRect(x, plot.y(0) - height, Math.max(plot.x(i + 1) - x - 1, 1), height);
      });
      return scale(top * plot.reach);
    }, (place) => {
      const i = Math.floor(place);
      return found.counts[i] === undefined ? "" : `${number(found.edges[i])} to ${number(found.edges[i + 1])} ms: ${number(found.counts[i])} rows`;
    });
    return view;
  }).filter(Boolean);
}

function drawRun() {
  root.append(element("h1", data.name), element("p", [data.status, data.note].filter(Boolean).join("; "), "faint"));
  const facts = section("The run");
  facts.append(table(["", ""], data.facts, []));
  const made = section("Findings", data.findings.length || !data.steps ? "" : "None; nothing stands out.");
  if (data.findings.length) {
    const list = element("ol");
    for (const [text, evidence] of data.findings) {
      const item = element("li", text);
      item.append(element("p", evidence, "faint"));
      list.append(item);
    }
    made.append(list);
  }
  const wall = data.ledger.reduce((sum, [, ms]) => sum + ms, 0) || 1, ledger = section(`Wall time: ${seconds(wall)}`);
  ledger.append(table(["", "time", "share", "", ""], data.ledger.filter(isShown).map(([place, ms, meaning]) =>
    [place, `${fixed(ms / 1000, 3)} s`, percent(ms / wall), bar(ms / wall), meaning]), [1, 2]));
  if (data.steps) {
    const ends = data.steps.end, view = new View(data.steps.start[0], most(ends));
    drawSteps(view, data.steps);
    drawRows(view, data.rows);
    if (data.blocks) drawBlocks(view, data.blocks);
    const views = [view, ...drawLatencies(data.latencies)];
    // Once all have their place: a plot is as wide as the page leaves it.
    views.forEach((one) => one.draw());
    window.addEventListener("resize", () => views.forEach((one) => one.redraw()));
    drawPrefixes(data.prefixes);
    section("Slowest rows").append(table(["row", "sample", "id", "time", "queued", "because"],
      data.slow.map(([row, sample, id, ms, queued, reason]) => [row, sample, id, `${fixed(ms / 1000, 3)} s`, `${fixed(queued / 1000, 3)} s`, reason]), [0, 1, 3, 4]));
  }
  section("Configuration", data.command).append(table(["key", "value"], data.config, []));
}

function drawPrefixes(prefixes) {
  if (!prefixes) return;
  const made = section("Hit rate by prefix", prefixes.total
    ? `Rows that begin with the same block; ${number(prefixes.uses.length)} of ${number(prefixes.total)} such prefixes, those of most rows.`
    : "No two rows begin with the same block.");
  if (!prefixes.total) return;
  made.append(table(["hash", "first row", "rows", "prompt tokens", "cached", "rate", ""], prefixes.uses.map(
    ([hash, row, count, prompt, cached]) => [hash, row, number(count), number(prompt), number(cached),
      percent(cached / Math.max(prompt, 1)), bar(cached / Math.max(prompt, 1), COLORS.cached)]), [1, 2, 3, 4, 5]));
}

function drawSweep() {
  root.append(element("h1", data.name), element("p", `${data.runs.length} runs`, "faint"));
  const figure = (title, value) => (value === null ? "-" : data.shares.includes(title) ? percent(value)
    : fixed(value, Number.isInteger(value) || value >= 1000 ? 0 : 2));
  const head = ["run", ...data.deltas.map(([key]) => key), ...data.figures.map(([title]) => title), "status"];
  const rows = data.runs.map(([, status], i) => [i + 1, ...data.deltas.map(([, values]) => values[i]),
    ...data.figures.map(([title, values]) => figure(title, values[i])), status]);
  section("What differs, and what came out").append(table(head, rows, head.map((_, i) => i).slice(1 + data.deltas.length, -1)));
  const few = data.deltas.length > 2 ? [] : data.deltas;
  const run = (i) => (few.length ? `${i + 1}: ${few.map(([, values]) => values[i]).join(", ")}` : i + 1);
  const grid = element("div", undefined, "columns");
  section("Figures", ["Of each run, by its number above", ...few.map(([key]) => key)].join(", ")).append(grid);
  for (const [title, values] of data.figures) {
    const part = element("div"), top = Math.max(most(values.map((value) => value || 0)), 1e-12);
    part.append(element("p", title), table(["", "", ""], values.map((value, i) => [run(i), figure(title, value), bar((value || 0) / top)]), [1]));
    grid.append(part);
  }
  const walls = data.ledgers.map((places) => places.reduce((a, b) => a + b, 0) || 1);
  const shown = data.places.map((_, k) => k).filter((k) => isShown([data.places[k], most(data.ledgers.map((places) => places[k]))]));
  section("Share of the wall time").append(table(["run", ...shown.map((k) => data.places[k])],
    data.ledgers.map((places, i) => [run(i), ...shown.map((k) => percent(places[k] / walls[i]))]), shown.map((_, k) => k + 1)));
  section("Runs").append(table(["run", "directory"], data.runs.map(([name], i) => [i + 1, name]), []));
}

// A run has nearly always records of all its time.
function isShown([place, ms]) { return place !== "unrecorded" || ms > 0; }

document.title = `${data.name}: nanovllm report`;
if (data.kind === "run") drawRun(); else drawSweep();
document.documentElement.dataset.drawn = "true";
