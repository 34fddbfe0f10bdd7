// Sortable tables after the W3C ARIA pattern: a button in each header, aria-sort on the header that sorts.
"use strict";

const SortableTable = (() => {
  // A cell's value: data-value where given (numbers, "" for none), else its text.
  const valueOf = (row, index) => row.cells[index].dataset.value ?? row.cells[index].textContent.trim();

  function compare(a, b, kind) {
    if (kind === "text") return a.localeCompare(b, undefined, { numeric: true });
    return Number(a) - Number(b);
  }

  // Sorts the body; rows without a value stay at the end in both directions.
  function sort(table, column, direction) {
    const button = table.tHead.querySelector(`[data-sort="${CSS.escape(column)}"]`);
    if (!button) return;
    const header = button.closest("th");
    const rows = [...table.tBodies[0].rows];
    const sign = direction === "descending" ? -1 : 1;
    rows.sort((first, second) => {
      const a = valueOf(first, header.cellIndex), b = valueOf(second, header.cellIndex);
      if (a === "" || b === "") return (a === "") - (b === "");
      return sign * compare(a, b, button.dataset.kind);
    });
    table.tBodies[0].append(...rows);
    for (const other of table.tHead.querySelectorAll("th")) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", direction);
  }

  // Calls onSort(column, direction) after each click; numbers start with the largest, text with A.
  function attach(table, onSort) {
    table.tHead.addEventListener("click", (event) => {
      const button = event.target.closest("[data-sort]");
      if (!button) return;
      const now = button.closest("th").getAttribute("aria-sort");
      const first = button.dataset.kind === "text" ? "ascending" : "descending";
      const second = first === "ascending" ? "descending" : "ascending";
      const direction = now === first ? second : first;
      sort(table, button.dataset.sort, direction);
      onSort(button.dataset.sort, direction);
    });
  }

  return { attach, sort };
})();
