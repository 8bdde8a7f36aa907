// What the server says of itself, kept up to date; and whether it can be reached.

const RUNNING_MS = 1000;
const IDLE_MS = 5000;

/** Reads /stats at once, after something that changes them. A failure is shown where the page's own reading fails. */
export async function readStats(api, state) {
  try {
    state.set({ stats: await api.get("stats") });
  } catch {
    // of a server that can't be reached nothing new is known
  }
}

export class ServerWatch {
  #api;
  #state;
  #onChange;
  #timer = null;
  #lost = false;
  #isRunning = () => false;

  /** `onChange(error)`: with an ApiError when a request fails, with null when it works again. */
  constructor(api, state, onChange) {
    this.#api = api;
    this.#state = state;
    this.#onChange = onChange;
    document.addEventListener("visibilitychange", () => document.hidden || this.refresh());
  }

  /** Reads /stats, and /info where it may have changed; reads again later, sooner while `isRunning()`. */
  async start(isRunning) {
    this.#isRunning = isRunning;
    await this.refresh();
  }

  async refresh() {
    clearTimeout(this.#timer);
    try {
      const changed = this.#lost || !this.#state.get().info ? { info: await this.#api.get("info") } : {};
      this.#state.set({ ...changed, stats: await this.#api.get("stats") });
      if (this.#lost) this.#onChange(null);
      this.#lost = false;
    } catch (error) {
      this.#lost = true;
      this.#onChange(error);
      if (error.status === 401) return; // the user has cancelled: asked again by the next request
    }
    clearTimeout(this.#timer);
    if (!document.hidden) this.#timer = setTimeout(() => this.refresh(), this.#isRunning() ? RUNNING_MS : IDLE_MS);
  }
}
