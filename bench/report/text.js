// Text in charts that Vega-Lite does not place: sizes in bytes, and names that must not cover each other.
"use strict";

const ChartText = (() => {
  function bytes(count) {
    for (const unit of ["B", "KiB", "MiB"]) {
      if (count < 1024) return `${count < 100 ? Number(count.toPrecision(3)) : Math.round(count)} ${unit}`;
      count /= 1024;
    }
    return `${Math.round(count)} GiB`;
  }

  // Names beside the points of the front: up and left where space is free, down and right at the left edge. A name that
  // would cover another is left out, and so are all on a narrow page; the caption lists the whole front.
  function ofFront(front, points, width) {
    const costs = points.map((p) => Math.log(p.x));
    const least = Math.min(...costs), span = Math.max(...costs) - least || 1;
    const taken = [];
    const named = front.map((p) => ({ ...p, left_name: "", right_name: "" }));
    for (const p of width > 500 ? named : []) {
      const x = ((Math.log(p.x) - least) / span) * (width - 180), y = -350 * p.accuracy, long = 6.5 * p.name.length;
      const atEdge = x < long - 20;
      const box = atEdge ? { x0: x, x1: x + long, y: y + 14 } : { x0: x - long, x1: x, y: y - 10 };
      if (taken.some((other) => box.x0 < other.x1 && other.x0 < box.x1 && Math.abs(box.y - other.y) < 13)) continue;
      taken.push(box);
      p[atEdge ? "left_name" : "right_name"] = p.name;
    }
    return named;
  }

  // Names beside marks, from the top down; one that would cover another is left out. Places are in pixels.
  function beside(marks, width) {
    const taken = [];
    for (const mark of [...marks].sort((a, b) => a.y - b.y)) {
      Object.assign(mark.row, { left_name: "", right_name: "" });
      const long = 6.5 * mark.text.length, onLeft = mark.leftToo && mark.x > width - long - 130;
      const box = onLeft ? { x0: mark.x - long, x1: mark.x, y: mark.y } : { x0: mark.x, x1: mark.x + long, y: mark.y };
      if (width < 500 || taken.some((other) => box.x0 < other.x1 && other.x0 < box.x1 && Math.abs(box.y - other.y) < 13)) continue;
      taken.push(box);
      mark.row[onLeft ? "left_name" : "right_name"] = mark.text;
    }
  }

  // Where values of a logarithmic axis lie between 0 and 1.
  function placed(values) {
    const logs = values.map(Math.log), least = Math.min(...logs), span = Math.max(...logs) - least || 1;
    return logs.map((log) => (log - least) / span);
  }

  return { bytes, ofFront, beside, placed };
})();
