// The conversation: its turns so far, which every precision reads, and the answer that it goes on with.

import { el } from "./dom.js";
import { visible } from "./format.js";

const WHO = { system: "System", user: "You", assistant: "Assistant" };

/** Draws the turns of `state.messages` into `place`, an ordered list. */
export function drawConversation(place, { mode, messages }) {
  place.hidden = mode !== "chat" || !messages.length;
  place.replaceChildren(...messages.map((message) => turn(message)));
}

function turn({ role, content }) {
  const text = el("p", { dir: "auto" }, visible(content));
  return el("li", { className: `turn ${role}` }, el("b", {}, WHO[role] ?? role), text);
}

/** The messages with the turn that a run asked for and this column's answer to it. */
export function continued(asked, column) {
  const answer = { role: "assistant", content: column.text };
  return [...asked.messages, { role: "user", content: asked.prompt }, answer];
}
