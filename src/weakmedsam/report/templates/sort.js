"use strict";
for (const button of document.querySelectorAll("table.sortable th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, body = head.closest("table").tBodies[0];
    const column = head.cellIndex, up = head.getAttribute("aria-sort") !== "ascending";
    const key = (row) => {
      const cell = row.cells[column], value = cell.dataset.value;
      return value === undefined ? cell.textContent : Number(value);
    };
    const order = (a, b) => {
      const x = key(a), y = key(b);
      if (typeof x !== "number" || typeof y !== "number") return (up ? 1 : -1) * String(x).localeCompare(String(y), undefined, { numeric: true });
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return up ? x - y : y - x;
    };
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...[...body.rows].sort(order));
  });
}
