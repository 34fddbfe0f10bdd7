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

  const spot = (x, y) => ({ x0: x - 8, x1: x + 8, y });
  const meet = (a, b) => a.x0 < b.x1 && b.x0 < a.x1 && Math.abs(a.y - b.y) < 13;

  // Names beside the points of the front: up and left where space is free, down and right at the left edge. A name that
  // would cover another is left out, and so are all on a narrow page; the caption lists the whole front. With the boxes of
  // names and marks, from 0 at the leftmost point.
  function ofFront(front, points, width) {
    const costs = points.map((p) => Math.log(p.x));
    const least = Math.min(...costs), span = Math.max(...costs) - least || 1;
    const across = (p) => ((Math.log(p.x) - least) / span) * (width - 180);
    const taken = [];
    const named = front.map((p) => ({ ...p, left_name: "", right_name: "" }));
    for (const p of width > 500 ? named : []) {
      const x = across(p), y = -350 * p.accuracy, long = 6.5 * p.name.length;
      const atEdge = x < long - 20;
      const box = atEdge ? { x0: x, x1: x + long, y: y + 14 } : { x0: x - long, x1: x, y: y - 10 };
      if (taken.some((other) => meet(box, other))) continue;
      taken.push(box);
      p[atEdge ? "left_name" : "right_name"] = p.name;
    }
    return { front: named, taken: [...taken, ...points.map((p) => spot(across(p), -350 * p.accuracy))] };
  }

  // The notes of horizontal lines: at the right end, or at the left one where names or marks are in the way of that.
  function ofLines(lines, taken, left, right) {
    return Object.entries(lines).map(([name, y]) => {
      const text = `${name} ${(100 * y).toFixed(1)} %`, long = 6 * text.length;
      const box = (x0) => ({ x0, x1: x0 + long, y: -350 * y - 9 });
      const isFree = (place) => !taken.some((other) => meet(place, other));
      const onLeft = !isFree(box(right - long)) && isFree(box(left));
      taken.push(box(onLeft ? left : right - long));
      return { y, right_label: onLeft ? "" : text, left_label: onLeft ? text : "" };
    });
  }

  // The note at the lower left corner, or at the upper one where a name or a mark is in the way.
  function inCorner(text, taken) {
    const long = 6 * text.length, low = { x0: 0, x1: long, y: 18 };
    const isTop = taken.some((other) => meet(low, other));
    taken.push(isTop ? { ...low, y: -360 } : low);
    return { label: isTop ? "" : text, top_label: isTop ? text : "" };
  }

  // Names beside marks, from the top down; one that would cover another is left out. Places are in pixels, as are the boxes
  // of names and marks that it returns.
  function beside(marks, width) {
    const taken = [];
    for (const mark of [...marks].sort((a, b) => a.y - b.y)) {
      Object.assign(mark.row, { left_name: "", right_name: "" });
      const long = 6.5 * mark.text.length, onLeft = mark.leftToo && mark.x > width - long - 130;
      const box = onLeft ? { x0: mark.x - long, x1: mark.x, y: mark.y } : { x0: mark.x, x1: mark.x + long, y: mark.y };
      if (width < 500 || taken.some((other) => meet(box, other))) continue;
      taken.push(box);
      mark.row[onLeft ? "left_name" : "right_name"] = mark.text;
    }
    return [...taken, ...marks.map(({ x, y }) => spot(x, y))];
  }

  // Where values of a logarithmic axis lie between 0 and 1.
  function placed(values) {
    const logs = values.map(Math.log), least = Math.min(...logs), span = Math.max(...logs) - least || 1;
    return logs.map((log) => (log - least) / span);
  }

  return { bytes, ofFront, ofLines, inCorner, beside, placed };
})();
