// The system's message of a chat: a field that is folded away while there is none.

import { byId } from "./dom.js";

export function mountSystem(state) {
  const [part, input] = [byId("system-part"), byId("system")];
  input.addEventListener("input", () => state.set({ system: input.value }));
  const update = ({ mode, system }) => {
    part.hidden = mode !== "chat";
    if (input.value !== system) input.value = system;
  };
  part.open = Boolean(state.get().system);
  state.subscribe(update);
  update(state.get());
}
