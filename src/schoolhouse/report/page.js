"use strict";
// Everything on the page can be read without this script. It replaces the browser's slow native hints over the
// curves by a line, spots and a note that follow the pointer, and opens every fold for printing.

const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function clear(figure) {
  figure.querySelectorAll(".cross, .spot, .tip").forEach((old) => old.remove());
}

function point(figure, column) {
  clear(figure);
  const plot = column.ownerSVGElement;
  const { x, y } = column.dataset;
  const { left, width } = plot.getBoundingClientRect();
  const place = left - figure.getBoundingClientRect().left + (x / plot.viewBox.baseVal.width) * width;
  plot.append(element("line", { class: "cross", x1: x, x2: x, y1: column.getAttribute("y"), y2: Number(column.getAttribute("y")) + Number(column.getAttribute("height")) }));
  for (const height of y.split(" ")) plot.append(element("circle", { class: "spot", cx: x, cy: height, r: 3 }));
  const tip = document.createElement("div");
  tip.className = place > figure.clientWidth / 2 ? "tip leftward" : "tip";
  tip.textContent = column.note;
  tip.style.left = `${place + (place > figure.clientWidth / 2 ? -10 : 10)}px`;
  figure.append(tip);
}

function readable(root) {
  for (const column of root.querySelectorAll(".read[data-x]")) {
    const figure = column.closest("figure");
    const title = column.querySelector("title");
    column.note = title.textContent;
    title.remove();
    column.addEventListener("pointerenter", () => point(figure, column));
    column.closest("svg").addEventListener("pointerleave", () => clear(figure));
  }
}

readable(document);

addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll("details:not([open])")) {
    fold.open = true;
    fold.dataset.opened = "";
  }
});
addEventListener("afterprint", () => {
  for (const fold of document.querySelectorAll("details[data-opened]")) {
    fold.open = false;
    delete fold.dataset.opened;
  }
});
