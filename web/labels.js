/**
 * A visible label on each text box.
 *
 * The front end shows a text box's name as long as nothing is typed, or not at all. Its box is put
 * under a label of ours, in an element that both renderers show.
 */

const OURS = "ConceptSurgery";
const BOX = "customtext";
const LABELLED = "concept-surgery-text";

/** Whether a node type is one of this pack. */
export const isOurs = (name) => typeof name === "string" && name.startsWith(OURS);

/**
 * Put a label over each text box of a node.
 *
 * @param {object} node of the front end's graph.
 */
export function labelBoxes(node) {
  for (const widget of node.widgets ?? []) {
    const box = widget.inputEl ?? widget.element;
    if (widget.type !== BOX || box?.tagName !== "TEXTAREA" || box !== widget.element) continue;
    widget.element = labelled(box, titleOf(node, widget));
    widget.type = LABELLED; // else the newer renderer draws a box of its own, without a label
  }
}

/** What a text box is called in the user's language. */
function titleOf(node, widget) {
  const input = node.inputs?.find((one) => one.widget?.name === widget.name);
  const given = node.constructor?.nodeData?.input ?? {};
  const spec = { ...given.required, ...given.optional }[widget.name];
  const named = input?.label ?? input?.localized_name ?? widget.label;
  return named && named !== widget.name ? named : (spec?.[1]?.display_name ?? widget.name);
}

function labelled(box, title) {
  const outer = document.createElement("div");
  outer.className = "concept-surgery-labelled";
  outer.style.cssText = "display:flex;flex-direction:column;width:100%;height:100%;min-height:55px";
  outer.style.setProperty("--comfy-widget-min-height", "75"); // what the older renderer asks for
  const label = document.createElement("label");
  label.textContent = title; // text, whatever a translation holds
  label.style.cssText =
    "flex:none;font-size:11px;line-height:15px;opacity:.8;color:var(--input-text,#ddd);" +
    "pointer-events:none;user-select:none;white-space:nowrap;overflow:hidden";
  box.setAttribute("aria-label", title);
  box.style.flex = "1 1 0";
  box.style.minHeight = "0";
  box.style.width = "100%";
  outer.append(label, box);
  return outer;
}
