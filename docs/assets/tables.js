// A click on a column's head (or Enter on it) sorts the table by that column, and a second one the other way.
// Numbers are compared by the first number of a cell ("98.8 ± 0.2", "1.67 – 2.33"), anything else as text.
(function () {
  function key(cell) {
    var text = cell.textContent.trim();
    var number = parseFloat(text.replace(/^[^\d−-]*/, "").replace("−", "-").replace(/,/g, ""));
    return { text: text, number: number };
  }

  function compare(a, b) {
    var numeric = !isNaN(a.number) && !isNaN(b.number);
    if (numeric) return a.number - b.number;
    if (isNaN(a.number) !== isNaN(b.number)) return isNaN(a.number) ? 1 : -1;
    return a.text.localeCompare(b.text);
  }

  function sort(table, column, down) {
    var body = table.tBodies[0];
    var rows = Array.from(body.rows).map(function (row) { return { row: row, key: key(row.cells[column]) }; });
    rows.sort(function (a, b) { return (down ? -1 : 1) * compare(a.key, b.key); });
    rows.forEach(function (entry) { body.appendChild(entry.row); });
  }

  function prepare(table) {
    if (!table.tHead || !table.tBodies.length || table.tBodies[0].rows.length < 3) return;
    var heads = Array.from(table.tHead.rows[0].cells);
    heads.forEach(function (head, column) {
      head.setAttribute("aria-sort", "none");
      head.tabIndex = 0;
      function turn() {
        var down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach(function (other) { other.setAttribute("aria-sort", "none"); });
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        sort(table, column, down);
      }
      head.addEventListener("click", turn);
      head.addEventListener("keydown", function (event) { if (event.key === "Enter") turn(); });
    });
  }

  document.querySelectorAll("article table").forEach(prepare);
})();
