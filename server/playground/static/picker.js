// Which precisions to run: a checkbox each, those that this host can't run disabled with the reason.

import { el } from "./dom.js";
import { bytes, visible } from "./format.js";

/** Keeps the checkboxes in `place` as the server's precisions and the state's choice are. */
export function mountPicker(place, state) {
  const legend = place.querySelector("legend");
  const list = el("div", { className: "choices" });
  place.replaceChildren(legend, list);
  const boxes = new Map();
  const update = ({ stats, precisions }, patch = { stats, precisions }) => {
    if (!stats || !("stats" in patch || "precisions" in patch)) return;
    const names = Object.keys(stats.precisions);
    if (names.some((name) => !boxes.has(name)) || boxes.size !== names.length) {
      boxes.clear();
      for (const name of names) boxes.set(name, choice(name, state));
      list.replaceChildren(...[...boxes.values()].map(({ element }) => element));
    }
    for (const name of names) boxes.get(name).update(stats.precisions[name], precisions.includes(name));
    // of a server that has changed: what it can't run can't be unchecked either
    const able = precisions.filter((name) => (stats.precisions[name]?.state ?? "unavailable") !== "unavailable");
    if (able.length < precisions.length) state.set({ precisions: able });
  };
  state.subscribe(update);
  update(state.get());
}

function choice(name, state) {
  const id = `choice-${name}`;
  const input = el("input", { type: "checkbox", id });
  const note = el("small", { id: `${id}-note` });
  input.setAttribute("aria-describedby", note.id);
  input.addEventListener("change", () => {
    const { precisions, stats } = state.get();
    const chosen = new Set(precisions);
    if (input.checked) chosen.add(name);
    else chosen.delete(name);
    state.set({ precisions: Object.keys(stats.precisions).filter((one) => chosen.has(one)) });
  });
  const element = el("div", { className: "choice" }, input, el("label", { htmlFor: id }, name), note);
  return {
    element,
    update({ state: known, reason, memory }, checked) {
      input.disabled = known === "unavailable";
      input.checked = checked && !input.disabled;
      element.dataset.state = known;
      note.textContent = visible(noteOf(known, reason, memory));
      element.title = visible(reason ?? "");
    },
  };
}

function noteOf(state, reason, memory) {
  if (state === "loaded") return bytes(memory.weights_bytes);
  if (state === "unavailable" || state === "failed") return `${state}: ${reason}`;
  return state === "unloaded" ? "not loaded" : state;
}

/** Whether nothing is chosen and something may be without the user: the server has told nothing yet, or is loading. */
export function isToBeLoaded({ stats, precisions }) {
  if (precisions.length) return false;
  return !stats || Object.values(stats.precisions).some(({ state }) => state === "loading");
}
