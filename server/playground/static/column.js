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

const SHORTEST_MS = 100;
const WAITING = "Waiting for the first token";

export class Column {
  tokens = [];
  finish = null; // the API's finish reason
  timings = null; // the server's own, which the stream ends with
  #started = 0;
  #firstAt = 0;
  #lastAt = 0;
  #tracker = new Tracker();
  #figures = {};
  #spans = [];
  #pending = []; // spans that are not on the page yet

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

  /** Tokens per second after the first: the server's, until they are known as this tab receives them. */
  get speed() {
    const elapsed = this.timings?.decode_ms ?? this.#lastAt - this.#firstAt;
    // a fast model's tokens arrive many at a time: the tab can't tell before a while
    const known = this.tokens.length > 1 && elapsed > (this.timings ? 0 : SHORTEST_MS);
    return known ? (1000 * (this.tokens.length - 1)) / elapsed : null;
  }

  /** Milliseconds to the first token, likewise: the tab's include the network and the precision's loading. */
  get firstMs() {
    if (this.timings) return this.timings.queue_ms + this.timings.prefill_ms;
    return this.tokens.length ? this.#firstAt - this.#started : null;
  }

  start() {
    this.#started = performance.now();
    this.#enter("running", WAITING);
  }

  add(token) {
    const now = performance.now();
    if (!this.tokens.length) {
      this.#firstAt = now;
      this.#enter("running", "Generating");
    }
    this.#lastAt = now;
    const span = el("span", { className: "token", tabIndex: -1 }, token.special ? "" : visible(token.text));
    span.dataset.index = this.tokens.length;
    this.tokens.push(token);
    this.#spans.push(span);
    this.#pending.push(span);
  }

  /** Puts the tokens since the last call on the page: together, because each time costs a layout. */
  flush() {
    if (!this.#pending.length) return;
    const { scrollHeight, scrollTop, clientHeight } = this.output;
    const atEnd = scrollHeight - scrollTop - clientHeight < 40; // the user has not scrolled back
    this.output.append(...this.#pending.splice(0));
    if (atEnd) this.output.scrollTop = this.output.scrollHeight;
  }

  /** Ends the column: `finish` is the API's reason, `error` an error, neither: it was stopped. */
  end(finish, error = null) {
    this.flush();
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
        span.setAttribute("role", "group"); // without a role it may have no name
        span.setAttribute("aria-label", `first divergence: ${visible(this.tokens[index].text)}`);
        this.output.classList.add("diverged");
      }
    }
    const after = this.#tracker.first ?? Infinity;
    for (let i = this.#spans.length - 1; i > after && !this.#spans[i].classList.contains("after"); i -= 1) {
      this.#spans[i].classList.add("after");
    }
  }

  /** `known`: the precision's entry of /stats. */
  showMemory(known) {
    this.memory = known?.memory ?? null;
    this.#figures.weights.textContent = bytes(this.memory?.weights_bytes);
    this.#figures.kv.textContent = bytes(this.memory?.kv_cache_bytes);
    if (this.element.dataset.phase !== "running" || this.tokens.length) return;
    const isLoading = known?.state === "loading";
    this.phase.textContent = isLoading ? "Loading the precision" : WAITING;
  }

  showFigures() {
    this.#showTime(this.#figures.ttft, this.firstMs, milliseconds);
    this.#showTime(this.#figures.speed, this.speed, rate);
    this.#figures.count.textContent = String(this.tokens.length);
    if (this.isReference) return;
    const first = this.#tracker.first;
    const none = this.finish && this.tokens.length ? "none" : "–";
    this.#figures.divergence.textContent = first === null ? none : `token ${first + 1}`;
  }

  #showTime(figure, value, format) {
    const isTabs = value !== null && !this.timings;
    figure.replaceChildren(format(value), ...(isTabs ? [" ", el("small", {}, "in this tab")] : []));
  }

  #enter(phase, text) {
    this.element.dataset.phase = phase;
    this.phase.textContent = text;
  }
}
