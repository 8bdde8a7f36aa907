// Asks for a key. It goes to the API's module and nowhere else.

import { byId } from "./dom.js";
import { visible } from "./format.js";

/** Shows the dialog with the API's message; the key that was given, or null. */
export function askKey(message) {
  const [dialog, form, input] = [byId("key-dialog"), byId("key-form"), byId("key")];
  byId("key-message").textContent = visible(message);
  input.value = "";
  dialog.showModal();
  input.focus();
  return new Promise((resolve) => {
    const close = (key) => {
      form.onsubmit = byId("key-cancel").onclick = dialog.oncancel = null;
      input.value = "";
      dialog.close();
      resolve(key);
    };
    form.onsubmit = (event) => {
      event.preventDefault();
      close(input.value.trim() || null);
    };
    byId("key-cancel").onclick = () => close(null);
    dialog.oncancel = (event) => {
      event.preventDefault();
      close(null);
    };
  });
}
