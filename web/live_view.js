/**
 * What a run looks like at its node: stage, time left, bar, curve, pictures and a button.
 *
 * Everything that is shown is text or a number, and is put in as such: names of concepts and
 * prompts come from workflows that others made.
 */

const WIDTH = 300;
const HEIGHT = 80;
const SHARPNESS = 2; // pixels of the curve for one of the page, which a person may enlarge
const PICTURE = /^ffd8(?:[0-9a-f]{2})+$/; // a JPEG in hexadecimal digits
const LEFT = "#e8a33d";
const DRIFT = "#5aa9e6";

/** An element with a style, some text and children. */
function made(tag, style = {}, text = "", ...children) {
  const element = document.createElement(tag);
  Object.assign(element.style, style);
  if (text) element.textContent = text;
  element.append(...children);
  return element;
}

/** An image of a JPEG in hexadecimal digits; its address is let go when nobody needs it. */
function imageOf(digits) {
  const bytes = Uint8Array.from(digits.match(/../g), (pair) => parseInt(pair, 16));
  const image = made("img", { width: "64px", height: "64px", objectFit: "cover" });
  image.src = URL.createObjectURL(new Blob([bytes], { type: "image/jpeg" }));
  image.addEventListener("load", () => URL.revokeObjectURL(image.src), { once: true });
  return image;
}

/** A share as people read it: 3 %, 0.4 %. */
function percent(share) {
  if (typeof share !== "number" || !Number.isFinite(share)) return "not known";
  const value = 100 * Math.max(0, share);
  return `${value >= 10 || value === 0 ? value.toFixed(0) : value.toPrecision(1)} %`;
}

/** Seconds as people read them. */
function duration(seconds) {
  const whole = Math.max(1, Math.round(seconds));
  return whole < 60 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

/** Draw one line of the curve, its points at equal distances: most are steps. */
function drawLine(pen, points, place, colour) {
  const last = Math.max(1, points.length - 1);
  pen.strokeStyle = colour;
  pen.lineWidth = 2 * SHARPNESS;
  pen.beginPath();
  points.forEach((point, number) => {
    const share = point?.[place];
    if (typeof share !== "number" || !Number.isFinite(share)) return;
    const inner = pen.canvas.height - 2 * pen.lineWidth;
    const y = pen.lineWidth + inner * (1 - Math.min(1, Math.max(0, share)));
    pen.lineTo((pen.canvas.width * number) / last, y);
  });
  pen.stroke();
}

/** The view of one node. `element` is what a DOM widget shows; `onStop` is called by its button. */
export class LiveView {
  constructor(onStop) {
    this.stage = made("span", { overflow: "hidden", textOverflow: "ellipsis" });
    this.left = made("span", { opacity: "0.75", flex: "none" });
    const head = made("div", { display: "flex", gap: "8px", justifyContent: "space-between" });
    head.append(this.stage, this.left);

    this.bar = made("div", { height: "100%", width: "0", background: LEFT, borderRadius: "3px" });
    const track = { height: "6px", background: "rgba(128,128,128,0.3)", borderRadius: "3px" };
    this.track = made("div", { ...track, flex: "none" }, "", this.bar);

    this.curve = made("canvas", { width: "100%", height: `${HEIGHT}px` });
    Object.assign(this.curve, { width: WIDTH * SHARPNESS, height: HEIGHT * SHARPNESS });
    this.curve.style.background = "rgba(128,128,128,0.12)";
    this.remains = made("span", { color: LEFT });
    this.drift = made("span", { color: DRIFT });
    this.legend = made("div", { display: "flex", gap: "12px", flexWrap: "wrap" });
    this.legend.append(this.remains, this.drift);

    this.pictures = made("div", { display: "flex", gap: "10px", flexWrap: "wrap" });
    this.verdict = made("div", { whiteSpace: "pre-line", overflowWrap: "anywhere" });
    this.verdict.className = "concept-surgery-verdict";
    this.note = made("div", { opacity: "0.85", overflowWrap: "anywhere" });
    this.button = made("button", { cursor: "pointer", alignSelf: "flex-start" }, "Stop and keep");
    this.button.type = "button";
    this.button.title = "End after this step and go on with what was learned until then";
    this.button.addEventListener("click", onStop);
    // The canvas must not take the press for the beginning of a drag.
    this.button.addEventListener("pointerdown", (event) => event.stopPropagation());

    this.element = made("div", {
      display: "none",
      flexDirection: "column",
      gap: "6px",
      boxSizing: "border-box",
      width: "100%",
      padding: "6px 10px",
      overflow: "hidden",
      font: "12px sans-serif",
      color: "var(--input-text, #ddd)",
    });
    this.element.className = "concept-surgery-run";
    this.element.append(head, this.track, this.button, this.verdict, this.curve, this.legend);
    this.element.append(this.pictures, this.note);
    for (const child of this.element.children) child.style.flexShrink = "0"; // or it is cut off
    this.empty = true;
  }

  /** Show how a run stands. What is missing stays as it was: pictures come only when they change. */
  show(run) {
    const running = run.state === "running";
    this.empty = false;
    this.element.style.display = "flex";
    this.element.dataset.state = String(run.state);
    this.stage.textContent = running ? String(run.stage ?? "") : ENDS[run.state] ?? "";
    this.stage.title = this.stage.textContent;
    const known = running && typeof run.seconds_left === "number";
    this.left.textContent = known ? `at most ${duration(run.seconds_left)}` : "";
    this.bar.style.width = `${(100 * Math.min(1, Math.max(0, Number(run.share) || 0))).toFixed(1)}%`;
    this.track.style.display = running ? "" : "none";
    this.showCurve(Array.isArray(run.curve) ? run.curve : []);
    if (Array.isArray(run.pictures)) this.showPictures(run.pictures, running);
    this.verdict.textContent = running ? "" : String(run.verdict ?? "");
    this.verdict.style.display = this.verdict.textContent ? "" : "none";
    this.note.textContent = String(run.note ?? "");
    this.note.style.display = run.note ? "" : "none";
    this.button.style.display = running ? "" : "none";
    this.button.disabled = !running || !!run.stopping;
    this.button.textContent = run.stopping ? "Stopping…" : "Stop and keep";
  }

  showCurve(points) {
    const shown = points.length > 1;
    this.curve.style.display = shown ? "" : "none";
    this.legend.style.display = shown ? "flex" : "none";
    if (!shown) return;
    const pen = this.curve.getContext("2d");
    pen.clearRect(0, 0, this.curve.width, this.curve.height);
    [DRIFT, LEFT].forEach((colour, place) => drawLine(pen, points, 2 - place, colour));
    this.curve.dataset.points = String(points.length);
    const last = points[points.length - 1];
    this.remains.textContent = `What is left of it: ${percent(last[1])}`;
    this.drift.textContent = `Drift of the rest: ${percent(last[2])}`;
  }

  showPictures(pictures, running) {
    const figures = pictures.map((one) => {
      const figure = made("figure", { margin: "0" });
      const row = made("div", { display: "flex", gap: "3px" });
      for (const when of ["before", "now"]) {
        if (!PICTURE.test(one?.[when] ?? "")) continue;
        const image = imageOf(one[when]);
        image.alt = image.title = `${when === "now" && !running ? "after" : when}: ${one.label}`;
        row.append(image);
      }
      const pair = row.childElementCount > 1;
      const caption = { maxWidth: pair ? "131px" : "64px", overflow: "hidden", opacity: "0.75" };
      Object.assign(caption, { textOverflow: "ellipsis", whiteSpace: "nowrap" });
      figure.append(row, made("figcaption", caption, `${one.label}`));
      return figure;
    });
    this.pictures.replaceChildren(...figures);
    this.pictures.style.display = figures.length ? "flex" : "none";
  }

  /** Pixels that all of it needs, however many it is given. */
  height() {
    const shown = [...this.element.children].filter((child) => child.style.display !== "none");
    const inner = shown.reduce((sum, child) => sum + (child.offsetHeight ?? HEIGHT), 0);
    return Math.max(40, inner + 6 * Math.max(0, shown.length - 1) + 12);
  }
}

const ENDS = {
  done: "Finished",
  stored: "Taken from the store",
  stopped: "Stopped and kept",
  cancelled: "Cancelled",
  failed: "Ended by an error",
};
