// Quality against memory: a scatter plot with axes.

import { el, svg } from "../dom.js";
import { unitOf } from "../format.js";

const [NARROWEST, WIDEST] = [280, 680];
const [LOWEST, ROW] = [300, 16]; // more points need more room for their names
const MARGIN = { left: 56, right: 12, top: 34, bottom: 48 };
const LEAST = -6; // of the logarithm: below it, where fp32's own 0 is, all are drawn as one
const [LINE, CHARACTER] = [14, 7]; // of a label, in pixels

/** A figure of these rows, `[name, {weights_bytes, mean_kl}]`, drawn as wide as there is room. */
export function plot(rows) {
  const place = el("div", { className: "plot" });
  const height = Math.max(LOWEST, MARGIN.top + MARGIN.bottom + ROW * rows.length);
  place.style.blockSize = `${height}px`; // before it is drawn, so that drawing changes no size
  const figure = el("figure", {}, place,
    el("figcaption", { className: "hint" }, "Lower and further left is better. The table has the same figures."));
  let drawn = 0;
  new ResizeObserver(() => {
    const width = Math.max(NARROWEST, Math.min(figure.clientWidth, WIDEST));
    if (width === drawn) return;
    drawn = width;
    place.replaceChildren(draw(rows, width, height));
  }).observe(figure);
  return figure;
}

function draw(rows, width, height) {
  const area = { left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: height - MARGIN.bottom };
  const [x, y] = [bytesAxis(rows, area), divergenceAxis(rows, area)];
  const points = rows.map(([name, row]) => ({ name, x: x.at(row.weights_bytes), y: y.at(row.mean_kl) }));
  const middle = (area.left + area.right) / 2;
  const about = `${y.title} over ${x.title} of ${rows.length} precisions`;
  return svg("svg", { width, height, role: "img", "aria-label": about },
    ...x.ticks.flatMap(({ at, text }) => [line(at, area.top, at, area.bottom), label(text, at, area.bottom + 18, "middle")]),
    ...y.ticks.flatMap(({ at, text }) => [line(area.left, at, area.right, at), label(text, area.left - 8, at + 4, "end")]),
    label(x.title, middle, height - 8, "middle"), label(y.title, 4, 16, "start"),
    svg("path", { class: "axis", d: `M${area.left} ${area.top}V${area.bottom}H${area.right}` }),
    ...points.map((point) => svg("circle", { cx: point.x, cy: point.y, r: 4 })), ...names(points, area));
}

/** From 0, in steps of 1, 2 or 5 and zeros. */
function bytesAxis(rows, { left, right }) {
  const largest = Math.max(...rows.map(([, row]) => row.weights_bytes), 1);
  const unit = unitOf(largest);
  const most = largest / unit.size;
  const power = 10 ** Math.floor(Math.log10(most / 4));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => most / one <= 5);
  const count = Math.ceil(most / step);
  const at = (bytes) => left + ((right - left) * bytes) / (count * step * unit.size);
  const ticks = Array.from({ length: count + 1 }, (_, index) => {
    const value = index * step;
    return { at: at(value * unit.size), text: String(Number(value.toPrecision(3))) };
  });
  return { title: `Weights (${unit.name})`, at, ticks };
}

/** By powers of ten, at most six; the lowest tick is of all that is smaller. */
function divergenceAxis(rows, { top, bottom }) {
  const powers = rows.map(([, row]) => Math.log10(row.mean_kl)).filter((power) => power > LEAST); // NaN below 0
  const low = Math.floor(Math.min(...powers, -2));
  const high = Math.max(Math.ceil(Math.max(...powers, low)), low + 1);
  const lowest = low - 0.8;
  const place = (power) => bottom - 6 - ((bottom - top - 12) * (power - lowest)) / (high - lowest);
  const every = Math.ceil((high - low + 1) / 6);
  const shown = Array.from({ length: high - low + 1 }, (_, index) => low + index).filter((one) => (high - one) % every === 0);
  return {
    title: "Mean KL divergence (nats per token)",
    at: (kl) => place(kl > 10 ** LEAST ? Math.log10(kl) : lowest),
    ticks: [{ at: place(lowest), text: `<10${raised(LEAST)}` }, ...shown.map((power) => ({ at: place(power), text: `10${raised(power)}` }))],
  };
}

const raised = (power) => String(power).replace(/./g, (sign) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(sign)]);

/** The points' names, each beside its point or, where others are, further off and with a line to it. */
function* names(points, area) {
  const taken = points.map(({ x, y }) => ({ left: x - 5, right: x + 5, top: y - 5, bottom: y + 5 }));
  for (const { name, x, y } of [...points].sort((one, other) => one.y - other.y)) {
    const size = name.length * CHARACTER;
    const places = Array.from({ length: 41 }, (_, k) => (k % 2 ? -1 : 1) * Math.ceil(k / 2) * LINE).flatMap((off) => [
      { side: 1, left: x + 8, right: x + 8 + size, top: y + off - LINE / 2, bottom: y + off + LINE / 2 },
      { side: -1, left: x - 8 - size, right: x - 8, top: y + off - LINE / 2, bottom: y + off + LINE / 2 },
    ]);
    const inside = places.filter((box) => box.left >= area.left && box.right <= area.right
      && box.top >= area.top - LINE / 2 && box.bottom <= area.bottom);
    const box = inside.find((one) => !taken.some((other) => meet(one, other))) ?? inside[0] ?? places[0];
    taken.push(box);
    const [end, middle] = [box.side > 0 ? box.left : box.right, (box.top + box.bottom) / 2];
    if (Math.abs(middle - y) > LINE) yield svg("path", { class: "axis", d: `M${x} ${y}L${end} ${middle}` });
    yield label(name, end, middle + 4, box.side > 0 ? "start" : "end");
  }
}

const meet = (one, other) =>
  one.left < other.right && other.left < one.right && one.top < other.bottom && other.top < one.bottom;

const label = (text, x, y, anchor) => svg("text", { x, y, "text-anchor": anchor }, text);

const line = (x1, y1, x2, y2) => svg("line", { class: "grid", x1, y1, x2, y2 });
