// The last report's advice, table and plot, and a button that makes a new one.

import { forModel } from "../api.js";
import { el } from "../dom.js";
import { bytes, rate, visible } from "../format.js";
import { readStats } from "../server.js";
import { plot } from "./plot.js";

export function mount(section, api, state) {
  const place = el("div");
  section.setAttribute("aria-labelledby", "report-heading");
  section.append(el("h2", { id: "report-heading" }, "Report"),
    el("p", { className: "hint" }, "Measures every precision on this host: memory, speed, quality against fp32. It takes minutes."),
    ...new Maker(api, state).elements, place);
  let [shown, about] = ["", undefined]; // what is drawn, and of which model
  const update = ({ stats, model }, patch = { stats, model }) => {
    if ("model" in patch && model !== about) {
      [shown, about] = ["", model];
      place.replaceChildren();
    }
    if (!stats || !("stats" in patch)) return;
    const found = JSON.stringify(stats.report);
    if (found === shown) return; // what is focused or scrolled stays so
    shown = found;
    place.replaceChildren(...drawn(stats.report));
  };
  state.subscribe(update);
  update(state.get());
}

/** Makes a report of the model that the page is about at the start, with its progress, until it is cancelled. */
class Maker {
  #abort = null;
  #about = ""; // the model, where there are several: the user may choose another one meanwhile

  constructor(api, state) {
    Object.assign(this, { api, state });
    this.status = el("p", { role: "status", "aria-live": "polite" });
    this.progress = el("progress", { hidden: true, "aria-label": "Progress of the report" });
    this.start = el("button", { type: "button", onclick: () => this.#make() }, "Make a report");
    this.cancel = el("button", { type: "button", disabled: true, onclick: () => this.#abort.abort() }, "Cancel");
    this.elements = [el("p", { className: "actions" }, this.start, this.cancel, this.progress), this.status];
  }

  async #make() {
    this.#abort = new AbortController();
    const { model, stats } = this.state.get();
    this.#about = stats?.models.length > 1 ? `${stats.model.id}: ` : "";
    this.#show("Starting…", true);
    let outcome = "Finished.";
    try {
      await this.api.stream(forModel("report", model), {}, (event) => this.#follow(event), this.#abort.signal);
    } catch (error) {
      outcome = error.name === "AbortError"
        ? "Cancelled. What was measured is kept; the next report continues." : visible(error.message);
    }
    this.#show(outcome, false);
    await readStats(this.api, this.state);
  }

  #show(text, running) {
    this.status.textContent = visible(this.#about) + text;
    const focused = document.activeElement;
    this.start.disabled = running;
    this.cancel.disabled = !running;
    if (!running) this.progress.hidden = true;
    if (focused === this.start || focused === this.cancel) (running ? this.cancel : this.start).focus(); // a disabled button has none
  }

  #follow({ step, steps, precision, stage, progress }) {
    if (!steps) return;
    this.progress.hidden = false;
    const part = progress?.total ? progress.current / progress.total : 0;
    Object.assign(this.progress, { max: steps, value: step - 1 + part });
    this.status.textContent = visible(`${this.#about}Step ${step} of ${steps}: ${precision}, ${stage}…`);
  }
}

function* drawn(report) {
  yield el("p", {}, visible(report.note));
  const rows = Object.entries(report.precisions);
  if (!rows.length) return;
  yield el("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Figures of the report" }, table(rows));
  const measured = rows.filter(([, row]) => row.mean_kl !== null);
  if (measured.length > 1) yield plot(measured);
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
