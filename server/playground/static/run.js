// A run: one request to each chosen precision, each answer streaming into a column of its own.

import { drawBars } from "./bars.js";
import { Column } from "./column.js";
import { inspect } from "./inspector.js";
import { drawSeed, parseEvent, requestFor } from "./requests.js";

const MOST_STREAMS = 4; // a browser opens six connections to a host: some stay free for the rest of the page
const REDRAWN_MS = 80;

/** The reference among these precisions. */
export const referenceOf = (names) => (names.includes("fp32") ? "fp32" : names[0]);

export class Runner {
  columns = [];
  #api;
  #state;
  #places;
  #abort = null;

  /** `places`: the elements `columns` and `bars`; `onContinue(column)` as in `Column`. */
  constructor(api, state, places, onContinue) {
    this.#api = api;
    this.#state = state;
    this.#places = places;
    this.onContinue = onContinue;
    state.subscribe((current, patch) => "stats" in patch && this.#showMemory(current.stats));
  }

  get running() {
    return this.#abort !== null;
  }

  /** Runs what the state asks for; resolves with a sentence for the status line. */
  async start() {
    const asked = structuredClone({ ...this.#state.get(), stats: null, info: null });
    const reference = referenceOf(asked.precisions);
    const names = [reference, ...asked.precisions.filter((name) => name !== reference)];
    const onContinue = asked.mode === "chat" ? this.onContinue : null;
    this.#show(names.map((name) => new Column(name, name === reference, onContinue)));
    this.asked = asked;
    const abort = (this.#abort = new AbortController());
    const drawing = setInterval(() => this.#draw(), REDRAWN_MS);
    const seed = drawSeed();
    const waiting = [...this.columns];
    const work = async () => {
      while (waiting.length) await this.#stream(waiting.shift(), asked, seed, abort.signal);
    };
    const atOnce = asked.oneByOne ? 1 : MOST_STREAMS;
    await Promise.all(Array.from({ length: atOnce }, work));
    clearInterval(drawing);
    this.#abort = null;
    this.#draw();
    return this.#summary(abort.signal.aborted, asked.parameters.seed ?? seed);
  }

  /** Closes the connections, by which the server frees the slots. */
  stop() {
    this.#abort?.abort();
  }

  clear() {
    this.stop();
    this.#show([]);
    this.#draw();
  }

  async #stream(column, asked, seed, signal) {
    let finish = null;
    let failure = null;
    try {
      signal.throwIfAborted();
      const { path, body } = requestFor(asked, column.name, seed);
      column.start();
      await this.#api.stream(path, body, (event) => (finish = this.#add(column, event) ?? finish), signal);
    } catch (error) {
      if (error.name !== "AbortError") failure = error;
    }
    column.end(finish, failure);
    this.#compare(column);
    if (column.keep) column.keep.hidden = finish === null;
  }

  #add(column, event) {
    const { tokens, finish, timings } = parseEvent(event);
    for (const token of tokens) column.add(token);
    if (timings) column.timings = timings;
    this.#compare(column);
    return finish;
  }

  #compare(changed) {
    const [reference, ...others] = this.columns;
    if (!reference) return;
    for (const column of changed === reference ? others : [changed]) column.compareWith(reference);
  }

  #show(columns) {
    this.columns = columns;
    this.#places.columns.replaceChildren(...columns.map((column) => column.element));
    columns.forEach(inspect);
    this.#showMemory(this.#state.get().stats);
    this.#draw();
  }

  #showMemory(stats) {
    for (const column of this.columns) column.showMemory(stats?.precisions[column.name]);
    if (!this.running) this.#draw();
  }

  #draw() {
    for (const column of this.columns) {
      column.flush();
      column.showFigures();
    }
    drawBars(this.#places.bars, this.columns);
  }

  #summary(stopped, seed) {
    const failed = this.columns.filter((column) => !column.error.hidden).length;
    const what = stopped ? "Stopped" : failed ? `Finished; ${failed} failed` : "Finished";
    return `${what}. Seed ${seed}.`;
  }
}
