// Elements from plain data. Text goes in as text, never as markup: labels and names are other people's words.

const SVG = "http://www.w3.org/2000/svg";

/** The page's element of this id. */
export function byId(id) {
  return document.getElementById(id);
}

/** An HTML element with attributes (null and false: left out; true: empty) and children. */
export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same in SVG. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}
