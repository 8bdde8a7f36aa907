// Which of the server's models the page is about: the chooser, which one model doesn't need, and the address.

import { el } from "./dom.js";
import { visible } from "./format.js";

const PARAMETER = "model";

/** The model that the page's address names; null: the server's default one. */
export const modelInAddress = () => new URLSearchParams(location.search).get(PARAMETER) || null;

/** The name that requests to the model of these statistics need; null: the default one's, which needs none. */
export const nameIn = ({ model, models }) => (model.id === models[0] ? null : model.id);

/** Keeps a chooser in `place` and the page's address as the state is; `onChoice(model)`: the user's. */
export function mountModels(place, state, onChoice) {
  const chooser = el("select", { id: "model-choice", autocomplete: "off" });
  chooser.addEventListener("change", () => onChoice(chooser.selectedIndex ? chooser.value : null));
  place.replaceChildren(el("label", { htmlFor: chooser.id }, "Model"), chooser);
  let names = [];
  const update = ({ stats, model }, patch = { stats, model }) => {
    if (patch.stats && stats.models.join("\n") !== names.join("\n")) {
      names = stats.models;
      chooser.replaceChildren(...names.map((name) => el("option", { value: name }, visible(name))));
      place.hidden = names.length < 2;
    }
    if (patch.stats || "model" in patch) chooser.value = model ?? names[0] ?? "";
    if ("model" in patch) showInAddress(model);
  };
  state.subscribe(update);
  update(state.get());
}

/** So that a link or a bookmark of this page leads to the same model. */
function showInAddress(model) {
  const address = new URL(location.href);
  if (model === null) address.searchParams.delete(PARAMETER);
  else address.searchParams.set(PARAMETER, model);
  if (address.href !== location.href) history.replaceState(history.state, "", address);
}
