/** What the nodes need of the front end: see the modules that are imported. */
import { app } from "../../scripts/app.js";
import { isOurs, labelBoxes } from "./labels.js";
import { TRAIN, putSettings, readsOldValues, withSettingsNodes } from "./old_workflows.js";
import { giveWords, searchByWords } from "./search.js";

app.registerExtension({
  name: "ConceptSurgery.Nodes",

  addCustomNodeDefs(definitions) {
    Object.values(definitions).forEach(giveWords);
  },

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name === TRAIN) readsOldValues(nodeType);
  },

  nodeCreated(node) {
    if (isOurs(node.comfyClass ?? node.type)) labelBoxes(node);
  },

  afterConfigureGraph: putSettings,

  setup() {
    searchByWords(app);
    const load = app.loadApiJson;
    if (typeof load !== "function") return;
    app.loadApiJson = function (graph, ...rest) {
      return load.call(this, withSettingsNodes(graph), ...rest);
    };
  },
});
