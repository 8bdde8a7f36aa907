// What a token is about, while it is pointed at or focused: its probability and its alternatives.

import { el } from "./dom.js";
import { percent, quoted } from "./format.js";

const box = el("div", { className: "inspector", id: "inspector", role: "tooltip", hidden: true });
document.body.append(box);

/** Shows the tokens of a column on hover, and on focus: arrow keys move, Escape closes. */
export function inspect(column) {
  const { output } = column;
  output.addEventListener("mouseover", (event) => show(column, event.target));
  output.addEventListener("mouseleave", close);
  output.addEventListener("focusin", (event) => show(column, event.target));
  output.addEventListener("focusout", close);
  output.addEventListener("keydown", (event) => move(column, event));
}

function move({ output }, event) {
  if (event.key === "Escape") return close();
  const at = document.activeElement === output ? -1 : Number(document.activeElement.dataset.index);
  const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: output.children.length - 1 }[event.key];
  if (next === undefined) return;
  event.preventDefault();
  output.children[next]?.focus();
}

function show(column, span) {
  const token = span.dataset.index === undefined ? undefined : column.tokens[span.dataset.index];
  if (!token) return;
  box.replaceChildren(...described(token, Number(span.dataset.index), column.isReference));
  box.hidden = false;
  span.setAttribute("aria-describedby", box.id);
  place(span.getBoundingClientRect());
}

function described(token, index, isReference) {
  const name = token.name ?? token.text;
  const parts = [el("p", { className: "what" }, `${index + 1}: ${quoted(name)}${token.special ? " (special)" : ""}`)];
  if (token.logprob !== null) parts.push(line("probability", `${percent(token.logprob)} (logprob ${token.logprob.toFixed(3)})`));
  const comparison = token.comparison;
  if (comparison?.logprob !== undefined) {
    parts.push(line("in the reference", `${percent(comparison.logprob)} (difference ${comparison.difference.toFixed(3)} nats)`));
  } else if (!isReference) parts.push(line("in the reference", comparison ? "not among its likeliest" : "not compared"));
  if (token.top.length) {
    const rows = token.top.map((one) => el("li", {}, el("span", {}, quoted(one.text)), ` ${percent(one.logprob)}`));
    parts.push(el("p", {}, "likeliest here:"), el("ol", {}, ...rows));
  }
  return parts;
}

const line = (label, value) => el("p", {}, el("b", {}, `${label}: `), value);

function place(around) {
  const { width, height } = box.getBoundingClientRect();
  const left = Math.max(8, Math.min(around.left, document.documentElement.clientWidth - width - 8));
  const below = around.bottom + 6;
  const top = below + height > window.innerHeight ? Math.max(8, around.top - height - 6) : below;
  box.style.left = `${left}px`; // by the object model, which the Content-Security-Policy permits
  box.style.top = `${top}px`;
}

function close() {
  box.hidden = true;
}
