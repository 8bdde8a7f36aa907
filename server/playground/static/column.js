// One precision's column: its answer as it streams, its figures, and where it leaves the reference.

import { el } from "./dom.js";
import { bytes, milliseconds, rate, visible } from "./format.js";
import { Tracker, heat } from "./divergence.js";

const FIGURES = {
  weights: "Weights",
  kv: "KV cache",
  ttft: "First token",
  speed: "Speed",
  count: "Tokens",
  divergence: "First divergence",
};

export class Column {
  tokens = [];
  finish = null; // the API's finish reason
  firstMs = null; // from the request to the first token
  #started = 0;
  #firstAt = 0;
  #lastAt = 0;
  #tracker = new Tracker();
  #figures = {};
  #spans = [];

  /** `onContinue(column)`: in a conversation, the next turn follows this answer. */
  constructor(name, isReference, onContinue = null) {
    this.name = name;
    this.isReference = isReference;
    this.phase = el("p", { className: "phase" }, "Waiting for its turn");
    this.output = el("div", { className: "output", dir: "auto", role: "group", tabIndex: 0 });
    this.output.setAttribute("aria-label", `Answer of ${name}; arrow keys move between its tokens`);
    this.error = el("p", { className: "error", role: "alert", hidden: true });
    const terms = Object.entries(FIGURES).filter(([key]) => key !== "divergence" || !isReference);
    const figures = terms.map(([key, label]) => {
      this.#figures[key] = el("dd", {}, "–");
      return el("div", {}, el("dt", {}, label), this.#figures[key]);
    });
    this.keep = onContinue && el("button", { type: "button", hidden: true, onclick: () => onContinue(this) });
    if (this.keep) this.keep.textContent = "Continue with this answer";
    const title = el("h3", {}, name, isReference ? el("span", { className: "badge" }, "reference") : null);
    const parts = [title, this.phase, el("dl", {}, ...figures), this.output, this.error, this.keep];
    this.element = el("article", { className: "column" }, ...parts.filter(Boolean));
    this.element.setAttribute("aria-label", name);
    this.element.dataset.precision = name;
  }

  get text() {
    return this.tokens.map((token) => (token.special ? "" : token.text)).join("");
  }

  /** Decoded tokens per second after the first, as this tab received them. */
  get speed() {
    const seconds = (this.#lastAt - this.#firstAt) / 1000;
    return this.tokens.length > 1 && seconds > 0 ? (this.tokens.length - 1) / seconds : null;
  }

  start() {
    this.#started = performance.now();
    this.#enter("running", "Waiting for the first token");
  }

  add(token) {
    const now = performance.now();
    if (!this.tokens.length) {
      this.firstMs = now - this.#started;
      this.#firstAt = now;
      this.#enter("running", "Generating");
    }
    this.#lastAt = now;
    const span = el("span", { className: "token", tabIndex: -1 }, token.special ? "" : visible(token.text));
    span.dataset.index = this.tokens.length;
    this.tokens.push(token);
    this.#spans.push(span);
    this.output.append(span);
    // follows its end, unless the user has scrolled back
    const { scrollHeight, scrollTop, clientHeight } = this.output;
    if (scrollHeight - scrollTop - clientHeight < 80) this.output.scrollTop = scrollHeight;
  }

  /** Ends the column: `finish` is the API's reason, `error` an error, neither: it was stopped. */
  end(finish, error = null) {
    this.finish = finish;
    if (error) {
      this.error.textContent = visible(`${error.message}${error.status ? ` (${error.status} ${error.code})` : ""}`);
      this.error.hidden = false;
    }
    if (error) this.#enter("failed", "Failed");
    else this.#enter(finish ? "done" : "stopped", finish ? `Finished: ${finish}` : "Stopped");
    this.showFigures();
  }

  /** Marks what the reference's tokens tell about this column's so far. */
  compareWith(reference) {
    if (reference === this) return;
    const steps = this.#tracker.advance(this.tokens, reference.tokens, reference.finish !== null);
    for (const [index, comparison] of steps) {
      this.tokens[index].comparison = comparison;
      const span = this.#spans[index];
      if (comparison.difference !== null) span.dataset.heat = heat(comparison.difference);
      if (index === this.#tracker.first) {
        span.classList.add("first");
        span.setAttribute("aria-label", `first divergence: ${this.tokens[index].text}`);
        this.output.classList.add("diverged");
      }
    }
    const after = this.#tracker.first ?? Infinity;
    for (let i = this.#spans.length - 1; i > after && !this.#spans[i].classList.contains("after"); i -= 1) {
      this.#spans[i].classList.add("after");
    }
  }

  showMemory(memory) {
    this.memory = memory;
    this.#figures.weights.textContent = bytes(memory?.weights_bytes);
    this.#figures.kv.textContent = bytes(memory?.kv_cache_bytes);
  }

  showFigures() {
    this.#figures.ttft.textContent = milliseconds(this.firstMs);
    this.#figures.speed.textContent = rate(this.speed);
    this.#figures.count.textContent = String(this.tokens.length);
    if (this.isReference) return;
    const first = this.#tracker.first;
    const none = this.finish && this.tokens.length ? "none" : "–";
    this.#figures.divergence.textContent = first === null ? none : `token ${first + 1}`;
  }

  #enter(phase, text) {
    this.element.dataset.phase = phase;
    this.phase.textContent = text;
  }
}
