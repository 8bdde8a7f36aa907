// The request on screen as code, to be copied.

import { el } from "../dom.js";
import { KEY, curl, hub, openai } from "./clients.js";

const CLIENTS = [["curl", curl], ["huggingface_hub", hub], ["openai", openai]];

export function mount(section, api, state) {
  const blocks = CLIENTS.map(([name, code]) => new Block(name, code));
  const precisionShown = el("b");
  section.setAttribute("aria-labelledby", "snippets-heading");
  section.append(
    el("h2", { id: "snippets-heading" }, "Snippets"),
    el("p", { className: "hint" }, "The request on screen, to ", precisionShown,
      `. If the server has a key, export it as ${KEY}; otherwise any value does.`),
    ...blocks.map((block) => block.element),
  );
  const update = (current) => {
    const precision = current.precisions[0] ?? "fp32";
    precisionShown.textContent = precision;
    for (const block of blocks) block.show(current, precision);
  };
  state.subscribe(update);
  update(state.get());
}

class Block {
  constructor(name, code) {
    this.code = code;
    this.text = el("code");
    this.copied = el("span", { role: "status", "aria-live": "polite" });
    const copy = el("button", { type: "button", "aria-label": `Copy the ${name} snippet`, onclick: () => this.#copy() }, "Copy");
    this.element = el("div", { className: "snippet" }, el("h3", {}, name, " ", copy, " ", this.copied),
      el("pre", { tabIndex: 0, role: "region", "aria-label": `${name} snippet` }, this.text));
    this.element.dataset.client = name;
  }

  show(state, precision) {
    const code = this.code(state, precision);
    if (code === this.text.textContent) return; // what may be selected stays so
    this.text.textContent = code;
    this.copied.textContent = "";
  }

  async #copy() {
    try {
      await navigator.clipboard.writeText(this.text.textContent);
      this.copied.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(this.text); // without a secure context: selected, to be copied by hand
      this.copied.textContent = "Selected";
    }
  }
}
