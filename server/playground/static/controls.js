// The sampling controls: names, types, limits and descriptions as /openapi.json has them.

import { el } from "./dom.js";
import { exactNumber } from "./json.js";

const ROUTES = { complete: "/generate", chat: "/v1/chat/completions" };
// which of the fields are about sampling, in this order; those that the schema lacks are left out
const SHOWN = [
  "max_new_tokens", "max_tokens", "do_sample", "temperature", "top_k", "top_p", "typical_p", "min_p",
  "repetition_penalty", "frequency_penalty", "presence_penalty", "seed", "stop", "min_tokens",
  "truncate", "truncate_prompt_tokens", "ignore_eos", "logprobs", "top_n_tokens", "top_logprobs",
];

/** Draws the controls of the state's mode into `place`; each change is set in `state.parameters`. */
export function drawControls(place, openapi, state) {
  const { mode, parameters } = state.get();
  const { properties } = bodyOf(openapi, ROUTES[mode]).schema;
  const fields = SHOWN.filter((name) => name in properties);
  const change = (name, value) => {
    const { [name]: _, ...others } = state.get().parameters;
    state.set({ parameters: value === undefined ? others : { ...others, [name]: value } });
  };
  place.replaceChildren(...fields.map((name) => control(name, properties[name], parameters[name], change)));
}

/** The document's own example of a prompt. */
export const examplePrompt = (openapi) => bodyOf(openapi, ROUTES.complete).example.inputs;

const bodyOf = (openapi, route) => openapi.paths[route].post.requestBody.content["application/json"];

function control(name, schema, value, change) {
  const kinds = schema.anyOf ?? [schema];
  const id = `parameter-${name}`;
  const kind = kinds.find(({ type }) => type && type !== "null") ?? {};
  const listed = kinds.find(({ type }) => type === "array");
  const make = listed ? lines : kind.type === "boolean" ? choice : number;
  const input = make(kind, value, schema.default, (found) => change(name, found));
  input.id = id;
  const text = [limits(kind, listed), schema.description].filter(Boolean).join("; ");
  const hint = el("small", { id: `${id}-hint` }, text);
  input.setAttribute("aria-describedby", hint.id);
  return el("div", { className: "parameter" }, el("label", { htmlFor: id }, name), input, hint);
}

function number(kind, value, standard, change) {
  const input = el("input", { type: "number", step: kind.type === "integer" ? 1 : "any", placeholder: shown(standard) });
  if (kind.minimum !== undefined) input.min = kind.minimum;
  if (kind.maximum !== undefined) input.max = kind.maximum;
  input.value = value ?? "";
  input.addEventListener("input", () => change(input.value === "" ? undefined : exactNumber(input.value)));
  return input;
}

function choice(kind, value, standard, change) {
  const options = [["", shown(standard)], ["true", "true"], ["false", "false"]];
  const input = el("select", {}, ...options.map(([key, text]) => el("option", { value: key }, text)));
  input.value = value ?? "";
  input.addEventListener("change", () => change(input.value === "" ? undefined : input.value === "true"));
  return input;
}

function lines(kind, value, standard, change) {
  const input = el("textarea", { rows: 1, placeholder: "one on each line" });
  input.value = [value ?? []].flat().join("\n");
  input.addEventListener("input", () => {
    const found = input.value.split("\n").filter(Boolean);
    change(found.length ? found : undefined);
  });
  return input;
}

const shown = (standard) => (standard === undefined || standard === null ? "default" : String(standard));

function limits(kind, listed) {
  if (listed) return `at most ${listed.maxItems}, each of ${kind.minLength} to ${kind.maxLength} characters`;
  const parts = [];
  if (kind.exclusiveMinimum !== undefined) parts.push(`> ${kind.exclusiveMinimum}`);
  if (kind.minimum !== undefined) parts.push(`≥ ${kind.minimum}`);
  if (kind.exclusiveMaximum !== undefined) parts.push(`< ${kind.exclusiveMaximum}`);
  if (kind.maximum !== undefined) parts.push(`≤ ${kind.maximum}`);
  return parts.join(", ");
}
