// The server's API: JSON, server-sent events, the key, and errors as the API says them.

import { stringify } from "./json.js";

// of this module's address rather than the page's, so that it holds behind any path prefix
const BASE = new URL("..", import.meta.url);

/** A route's path for a model; null: the server's default one, which needs no name. */
export const forModel = (path, model) => (model === null ? path : `${path}?model=${encodeURIComponent(model)}`);

/** An error of the API. `status` is 0 where no response came; `code` is its error_type, or OpenAI's code or type. */
export class ApiError extends Error {
  constructor(status, code, message) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.code = code;
  }
}

export class Api {
  #key = ""; // in this module's memory alone
  #asking = null;
  #askKey;

  /** `askKey(message)` returns a promise of a key, or of null if the user gives none. */
  constructor(askKey = async () => null) {
    this.#askKey = askKey;
  }

  /** JSON as an object; another type as text. `accept`: the media type to ask for. */
  async get(path, { accept = "application/json", signal } = {}) {
    return content(await this.#request(path, { headers: { Accept: accept }, signal }));
  }

  async post(path, body, { accept = "application/json", signal } = {}) {
    return content(await this.#request(path, posted(body, accept, signal)));
  }

  /**
   * Posts and calls `onEvent(data)` for each server-sent event; resolves at the end of the stream.
   * Aborting `signal` closes the connection, by which the server frees the slot.
   */
  async stream(path, body, onEvent, signal) {
    const response = await this.#request(path, posted(body, "text/event-stream", signal));
    for await (const data of events(response.body)) {
      if (data === "[DONE]") continue;
      const event = JSON.parse(data);
      if (event.error) throw described(response.status, event);
      onEvent(event);
    }
  }

  async #request(path, options) {
    for (;;) {
      const key = this.#key;
      const response = await this.#fetch(path, options, key);
      if (response.ok) return response;
      const error = described(response.status, await body(response), response.statusText);
      if (response.status !== 401 || !(await this.#renewKey(key, error.message))) throw error;
      options.signal?.throwIfAborted();
    }
  }

  async #fetch(path, options, key) {
    const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    try {
      const url = new URL(path.replace(/^\/+/, ""), BASE);
      return await fetch(url, { ...options, headers, cache: "no-store", credentials: "same-origin" });
    } catch (error) {
      throw lost(error);
    }
  }

  /** Whether there is another key than the one refused; several refused requests ask once. */
  async #renewKey(refused, message) {
    if (this.#key !== refused) return true;
    this.#asking ??= this.#askKey(message).finally(() => {
      this.#asking = null;
    });
    const key = await this.#asking;
    if (key) this.#key = key;
    return Boolean(key);
  }
}

function posted(content, accept, signal) {
  const headers = { Accept: accept, "Content-Type": "application/json" };
  const sent = content === undefined ? undefined : stringify(content);
  return { method: "POST", headers, body: sent, signal };
}

async function content(response) {
  try {
    const isJson = (response.headers.get("content-type") ?? "").includes("json");
    return await (isJson ? response.json() : response.text());
  } catch (error) {
    throw lost(error);
  }
}

async function body(response) {
  try {
    return await response.json();
  } catch {
    return {}; // not the API's: a proxy's page
  }
}

function described(status, { error, error_type: type }, fallback = "") {
  if (typeof error === "string") return new ApiError(status, type ?? "", error);
  if (error) return new ApiError(status, error.code ?? error.type ?? "", error.message ?? "");
  return new ApiError(status, "", `HTTP ${status} ${fallback}`.trim());
}

function lost(error) {
  if (error.name === "AbortError") return error;
  return new ApiError(0, "connection", "The connection to the server failed. It may be restarting.");
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => Promise.reject(lost(error)));
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) if (block.startsWith("data:")) yield block.slice(5).trim();
    }
  } finally {
    reader.cancel().catch(() => {}); // an error of its own after a lost connection
  }
}
