// Bars that compare the columns: memory and speed, as tables whose middle column is drawn.

import { el, svg } from "./dom.js";
import { bytes, milliseconds, rate } from "./format.js";

const CHARTS = [
  { title: "Weights", value: (column) => column.memory?.weights_bytes, text: bytes, better: "smaller" },
  { title: "KV cache", value: (column) => column.memory?.kv_cache_bytes, text: bytes, better: "smaller" },
  { title: "Speed", value: (column) => column.speed, text: rate, better: "larger", isTime: true },
  { title: "Time to first token", value: (column) => column.firstMs, text: milliseconds, better: "smaller", isTime: true },
];

/** Draws the charts of these columns into `place`. */
export function drawBars(place, columns) {
  place.replaceChildren(...(columns.length ? CHARTS.map((chart) => draw(chart, columns)) : []));
}

function draw({ title, value, text, better, isTime }, columns) {
  const values = columns.map((column) => value(column) ?? null);
  const most = Math.max(0, ...values.filter((one) => one !== null));
  const rows = columns.map((column, index) => {
    const share = most && values[index] !== null ? values[index] / most : 0;
    const bar = svg("rect", { width: `${100 * share}%`, height: 12, rx: 2 });
    const drawing = svg("svg", { class: "bar", height: 12, width: "100%", "aria-hidden": "true" }, bar);
    const row = el("tr", {}, el("th", { scope: "row" }, column.name), el("td", {}, drawing), el("td", {}, text(values[index])));
    if (column.isReference) row.className = "is-reference";
    return row;
  });
  const known = columns.filter((column, index) => values[index] !== null);
  const tabs = known.filter((column) => !column.timings);
  const measured = isTime && tabs.length ? `, ${tabs.length < known.length ? "partly " : ""}in this tab` : "";
  const caption = el("caption", {}, `${title} `, el("small", {}, `${better} is better${measured}`));
  return el("table", { className: "bars" }, caption, el("tbody", {}, ...rows));
}
