// Completing a prompt, or a conversation: the second where the model has a chat template.

import { byId, el } from "./dom.js";

const MODES = { complete: "Complete", chat: "Chat" };
const LABELS = { complete: "Prompt", chat: "Your message" };

/** Two radio buttons in `place`. Each mode has its own parameters, by the names of its API. */
export function mountMode(place, state) {
  const buttons = Object.entries(MODES).map(([mode, text]) => {
    const input = el("input", { type: "radio", name: "mode", id: `mode-${mode}`, value: mode });
    input.addEventListener("change", () => enter(mode, state));
    return { mode, input, label: el("label", { htmlFor: input.id }, text) };
  });
  const reason = el("small", { hidden: true }, "Chat needs a model with a chat template; this one has none.");
  const legend = el("legend", { className: "visually-hidden" }, "Mode");
  place.append(el("fieldset", { className: "modes" }, legend, ...buttons.flatMap(({ input, label }) => [input, label]), reason));

  const update = ({ mode, info }) => {
    const canChat = Boolean(info?.chat_template);
    for (const button of buttons) button.input.checked = button.mode === mode;
    byId("mode-chat").disabled = !canChat;
    reason.hidden = !info || canChat;
    byId("prompt-label").textContent = LABELS[mode];
    if (info && !canChat && mode === "chat") enter("complete", state);
  };
  state.subscribe(update);
  update(state.get());
}

function enter(mode, state) {
  const { mode: before, parameters, otherParameters } = state.get();
  if (mode !== before) state.set({ mode, parameters: otherParameters, otherParameters: parameters });
}
