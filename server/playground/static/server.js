// What the server says of itself, kept up to date; and whether it can be reached.

import { forModel } from "./api.js";
import { nameIn } from "./models.js";

const RUNNING_MS = 1000;
const IDLE_MS = 5000;

/** Reads /stats at once, after something that changes them. A failure is shown where the page's own reading fails. */
export async function readStats(api, state) {
  const { model } = state.get();
  try {
    const stats = await api.get(forModel("stats", model));
    if (state.get().model === model) state.set({ stats }); // else the user has chosen another one meanwhile
  } catch {
    // of a server that can't be reached nothing new is known
  }
}

export class ServerWatch {
  #api;
  #state;
  #onChange;
  #onUnknownModel;
  #timer = null;
  #lost = false;
  #isRunning = () => false;

  /**
   * `onChange(error)`: with an ApiError when a request fails, with null when it works again.
   * `onUnknownModel(error)`: the server has no such model; it is to set another.
   */
  constructor(api, state, onChange, onUnknownModel) {
    this.#api = api;
    this.#state = state;
    this.#onChange = onChange;
    this.#onUnknownModel = onUnknownModel;
    document.addEventListener("visibilitychange", () => document.hidden || this.refresh());
  }

  /** Reads /stats, and /info where it may have changed; reads again later, sooner while `isRunning()`. */
  async start(isRunning) {
    this.#isRunning = isRunning;
    await this.refresh();
  }

  async refresh() {
    clearTimeout(this.#timer);
    const { model, info } = this.#state.get();
    try {
      const changed = this.#lost || !info ? { info: await this.#api.get(forModel("info", model)) } : {};
      const stats = await this.#api.get(forModel("stats", model));
      if (this.#state.get().model !== model) return; // the user has chosen another one, which is being read
      this.#state.set({ ...changed, stats, model: nameIn(stats) });
      if (this.#lost) this.#onChange(null);
      this.#lost = false;
    } catch (error) {
      if (this.#state.get().model !== model) return;
      if (error.status === 404 && model !== null) {
        this.#onUnknownModel(error);
        return this.refresh();
      }
      this.#lost = true;
      this.#onChange(error);
      if (error.status === 401) return; // the user has cancelled: asked again by the next request
    }
    clearTimeout(this.#timer);
    if (!document.hidden) this.#timer = setTimeout(() => this.refresh(), this.#isRunning() ? RUNNING_MS : IDLE_MS);
  }
}
