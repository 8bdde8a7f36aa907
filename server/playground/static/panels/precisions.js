// Every precision's state and memory, loading and unloading, and what the host has room for.

import { forModel } from "../api.js";
import { el } from "../dom.js";
import { bytes, visible } from "../format.js";
import { readStats } from "../server.js";

export function mount(section, api, state) {
  const gauge = new Gauge();
  const rows = el("tbody");
  const message = el("p", { role: "status", "aria-live": "polite" });
  section.setAttribute("aria-labelledby", "precisions-heading");
  section.append(
    el("h2", { id: "precisions-heading" }, "Precisions"),
    gauge.element,
    message,
    el("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Precisions of this model" },
      el("table", {}, heads(["precision", "state", "weights", "KV cache", "bits per weight", ""]), rows)),
  );
  const shown = new Map();
  let about; // the model of the rows
  const update = ({ stats, model }, patch = { stats, model }) => {
    if ("model" in patch && model !== about) {
      about = model;
      shown.clear();
      rows.replaceChildren();
      message.textContent = "";
    }
    if (!stats || !("stats" in patch)) return;
    gauge.show(stats);
    for (const [name, known] of Object.entries(stats.precisions)) {
      if (!shown.has(name)) shown.set(name, new Row(name, api, state, message));
      const row = shown.get(name);
      if (!row.element.isConnected) rows.append(row.element);
      row.show(known);
    }
  };
  state.subscribe(update);
  update(state.get());
}

/** What the loaded precisions, of all models, take of the memory that there is for them. */
class Gauge {
  constructor() {
    this.meter = el("meter", { id: "memory-gauge", min: 0 });
    this.text = el("span");
    this.label = el("label", { htmlFor: "memory-gauge" });
    this.element = el("p", { className: "gauge" }, this.label, this.meter, this.text);
  }

  show({ models, memory: { limit_bytes: limit, used_bytes: used, free_bytes: free } }) {
    this.label.textContent = models.length > 1 ? "Memory of all models" : "Memory of all precisions";
    const total = limit ?? used + free;
    Object.assign(this.meter, { max: total, high: 0.9 * total, value: used });
    const of = limit === null ? "" : ` of a budget of ${bytes(limit)}`;
    this.text.textContent = `${bytes(used)} taken${of} by weights and what their caches may grow to, ${bytes(free)} free for more`;
  }
}

/** A precision of the model that the page is about when the row is made. */
class Row {
  #busy = false;

  constructor(name, api, state, message) {
    Object.assign(this, { name, api, state, message, model: state.get().model });
    this.cells = ["state", "weights", "cache", "bits"].map((className) => el("td", { className }));
    this.button = el("button", { type: "button", onclick: () => this.#act() });
    this.progress = el("progress", { hidden: true, "aria-label": `Loading ${name}` });
    this.element = el("tr", {}, el("th", { scope: "row" }, name), ...this.cells,
      el("td", {}, this.button, " ", this.progress));
  }

  show(known) {
    this.known = known;
    const { state, reason, memory } = known;
    this.loaded = state === "loaded";
    const texts = [reason ? `${state}: ${reason}` : state, bytes(memory?.weights_bytes), bytes(memory?.kv_cache_bytes),
      memory?.bits_per_weight?.toFixed(2) ?? "–"];
    this.cells.forEach((cell, index) => (cell.textContent = visible(texts[index])));
    this.button.textContent = this.loaded ? "Unload" : "Load";
    this.button.setAttribute("aria-label", `${this.button.textContent} ${this.name}`);
    this.button.disabled = this.#busy || state === "unavailable" || state === "loading";
  }

  async #act() {
    this.#busy = this.button.disabled = true;
    const verb = this.loaded ? "unload" : "load";
    const path = forModel(`precisions/${this.name}/${verb}`, this.model);
    this.#say(`${verb}ing…`);
    try {
      if (this.loaded) await this.api.post(path);
      else await this.api.stream(path, undefined, (event) => this.#follow(event));
      this.#say(`${verb}ed.`);
    } catch (error) {
      this.#say(visible(error.message));
    }
    this.#busy = false;
    this.progress.hidden = true;
    this.show(this.known); // at least: the statistics may not come
    await readStats(this.api, this.state);
  }

  #follow({ stage, progress }) {
    this.progress.hidden = false;
    if (!progress?.total) this.progress.removeAttribute("value"); // of unknown length
    else Object.assign(this.progress, { max: progress.total, value: progress.current });
    if (stage) this.#say(`${visible(stage)}…`);
  }

  #say(text) {
    if (this.element.isConnected) this.message.textContent = `${this.name}: ${text}`; // else of another model
  }
}

function heads(names) {
  return el("thead", {}, el("tr", {}, ...names.map((name) => el(name ? "th" : "td", name ? { scope: "col" } : {}, name))));
}
