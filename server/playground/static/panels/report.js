// The last report's advice, table and plots, and a button that makes a new one.

import { el, svg } from "../dom.js";
import { bytes, rate, visible } from "../format.js";

export async function mount(section, api) {
  const place = el("div");
  const status = el("p", { role: "status", "aria-live": "polite" });
  const progress = el("progress", { hidden: true, "aria-label": "Progress of the report" });
  const make = el("button", { type: "button" }, "Make a report");
  const cancel = el("button", { type: "button", disabled: true }, "Cancel");
  section.setAttribute("aria-labelledby", "report-heading");
  section.append(el("h2", { id: "report-heading" }, "Report"),
    el("p", { className: "hint" }, "Measures every precision on this host: memory, speed, quality against fp32. It takes minutes."),
    el("p", { className: "actions" }, make, cancel, progress), status, place);
  let abort = null;

  async function show() {
    try {
      place.replaceChildren(...drawn(await api.get("stats")));
    } catch (error) {
      place.replaceChildren(el("p", { className: "error" }, visible(error.message)));
    }
  }

  function follow({ step, steps, precision, stage }) {
    if (!steps) return;
    progress.hidden = false;
    Object.assign(progress, { max: steps, value: step });
    status.textContent = visible(`Step ${step} of ${steps}: ${precision}, ${stage}…`);
  }

  make.addEventListener("click", async () => {
    abort = new AbortController();
    make.disabled = !(cancel.disabled = false);
    status.textContent = "Starting…";
    let failed = null;
    try {
      await api.stream("report", {}, (event) => {
        if (event.status === "failed") failed = event.error;
        follow(event);
      }, abort.signal);
      status.textContent = failed === null ? "Finished." : visible(failed);
    } catch (error) {
      status.textContent = error.name === "AbortError"
        ? "Cancelled. What was measured is kept; the next report continues." : visible(error.message);
    }
    progress.hidden = cancel.disabled = true;
    make.disabled = false;
    await show();
  });
  cancel.addEventListener("click", () => abort.abort());
  await show();
}

function* drawn({ report }) {
  yield el("p", {}, visible(report.note));
  const rows = Object.entries(report.precisions);
  if (!rows.length) return;
  yield el("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Figures of the report" }, table(rows));
  const measured = rows.filter(([, row]) => row.mean_kl !== null);
  if (measured.length > 1) yield scatter(measured);
}

function table(rows) {
  const heads = ["precision", "weights", "load", "tokens/s, one row", "× fp32", "perplexity ÷ fp32's", "mean KL", "top-1"];
  const figure = (value, digits) => (value === null || value === undefined ? "–" : value.toPrecision(digits));
  return el("table", {},
    el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head)))),
    el("tbody", {}, ...rows.map(([name, row]) => el("tr", {}, el("th", { scope: "row" }, name),
      ...[bytes(row.weights_bytes), `${row.load_seconds} s`, rate(row.tokens_per_second["1"]), figure(row.speed_ratio_to_fp32, 3),
        figure(row.perplexity_ratio, 5), figure(row.mean_kl, 3), figure(row.top1_agreement, 4)].map((text) => el("td", {}, text))))));
}

/** Quality against memory: mean KL from fp32, by its logarithm, over the bytes of the weights. */
function scatter(rows) {
  const [width, height, margin] = [560, 260, 44];
  const least = 1e-6; // fp32's own is 0
  const depth = (row) => Math.log10(Math.max(row.mean_kl, least));
  const largest = Math.max(...rows.map(([, row]) => row.weights_bytes));
  const [low, high] = [Math.min(...rows.map(([, row]) => depth(row))), Math.max(...rows.map(([, row]) => depth(row)))];
  const x = (row) => margin + (width - 3 * margin) * (row.weights_bytes / largest);
  const y = (row) => height - margin - (height - 2 * margin) * ((depth(row) - low) / (high - low || 1));
  const label = (text, at) => svg("text", { class: "label", ...at }, text);
  return el("figure", {},
    svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Mean KL divergence against memory" },
      svg("path", { class: "axis", d: `M${margin} ${margin / 2}V${height - margin}H${width - margin}` }),
      label("weights →", { x: width - 2.2 * margin, y: height - margin / 3 }), label("mean KL ↑ (log)", { x: 4, y: 14 }),
      ...rows.flatMap(([name, row]) => [svg("circle", { cx: x(row), cy: y(row), r: 4 }), label(name, { x: x(row) + 7, y: y(row) + 4 })])),
    el("figcaption", { className: "hint" }, "Lower and further left is better."));
}
