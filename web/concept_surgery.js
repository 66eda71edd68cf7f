/** What the nodes need of the front end: see the modules that are imported. */
import { app } from "../../scripts/app.js";
import { TRAIN, putSettings, readsOldValues, withSettingsNodes } from "./old_workflows.js";

app.registerExtension({
  name: "ConceptSurgery.OldWorkflows",

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name === TRAIN) readsOldValues(nodeType);
  },

  afterConfigureGraph: putSettings,

  setup() {
    const load = app.loadApiJson;
    if (typeof load !== "function") return;
    app.loadApiJson = function (graph, ...rest) {
      return load.call(this, withSettingsNodes(graph), ...rest);
    };
  },
});
