// The page's state: observable, and kept over a reload in this tab. Never the key.

import { kept, restored } from "./json.js";

const KEPT = ["model", "prompt", "system", "messages", "mode", "precisions", "parameters", "otherParameters", "oneByOne"];
const EMPTY = {
  model: null, // its name, where the server has several; null: the default one
  prompt: "",
  system: "", // the system's message, ahead of the conversation
  messages: [], // of the conversation: {role, content}
  mode: "complete", // or "chat"
  precisions: [], // names of the model's chosen ones
  // of the mode, by its API's names; at first, what shows how far the precisions differ
  parameters: { top_n_tokens: 5 },
  otherParameters: { temperature: 0, logprobs: true, top_logprobs: 5 }, // of the other mode
  oneByOne: false, // whether the precisions run one after another
  stats: null, // GET /stats of the model
  info: null, // GET /info of the model
};

/** A state with `get()`, `set(patch)` and `subscribe(fn)`, which returns its end; `fn(state, patch)`. */
export function createState(storage = window.sessionStorage, name = `bitdial:${location.pathname}`) {
  let current = { ...EMPTY, ...stored(storage, name) };
  const subscribers = new Set();
  return {
    get: () => current,
    set(patch) {
      current = { ...current, ...patch };
      if (KEPT.some((key) => key in patch)) store(storage, name, current);
      for (const subscriber of subscribers) subscriber(current, patch);
    },
    subscribe(subscriber) {
      subscribers.add(subscriber);
      return () => subscribers.delete(subscriber);
    },
  };
}

function stored(storage, name) {
  try {
    const found = restored(storage.getItem(name) ?? "{}");
    return Object.fromEntries(KEPT.filter((key) => key in found).map((key) => [key, found[key]]));
  } catch {
    return {}; // no storage here, or another version's
  }
}

function store(storage, name, state) {
  try {
    storage.setItem(name, kept(Object.fromEntries(KEPT.map((key) => [key, state[key]]))));
  } catch {
    // full or forbidden: the page works without
  }
}
