// The shift explorer: which positions of an object look alike to a layer. No library, no request.
// A page may hold several; each calls mount() with its element and its data (see explorers.py).
const mount = (root, data) => {
  "use strict";
  const { canvas, size, offsets, objects, maps, colours, background } = data;
  const side = offsets.length;
  const count = side * side;
  const pairs = (count * (count - 1)) / 2;

  // ---- data: cosines of pairs i < j, 16 bits each, one object after the other -------------------
  const decoded = new Map();
  const values = (map) => {
    if (!decoded.has(map)) {
      const bytes = Uint8Array.from(atob(map.values), (letter) => letter.charCodeAt(0));
      decoded.set(map, new DataView(bytes.buffer));
    }
    return decoded.get(map);
  };
  const cosine = (map, object, i, j) => {
    if (i === j) return 1;
    const [a, b] = i < j ? [i, j] : [j, i];
    const place = (a * (2 * count - a - 1)) / 2 + (b - a - 1);
    const step = values(map).getUint16(2 * (object * pairs + place), true);
    return map.low + (step / 65535) * (1 - map.low);
  };
  const rgb = (share) => {
    const at = 6 * Math.round(255 * Math.min(1, Math.max(0, share)));
    return "#" + colours.slice(at, at + 6);
  };

  // ---- state ------------------------------------------------------------------------------------
  const middle = Math.floor((side - 1) / 2) * (side + 1);
  const state = { object: 0, encoder: maps[0].encoder, map: maps[0], reference: middle, other: null };
  state.map = maps.find((map) => map.encoder === state.encoder && map.start) ?? maps[0];
  const where = (index) => [offsets[index % side], offsets[Math.floor(index / side)]]; // left, top

  // ---- elements ---------------------------------------------------------------------------------
  const make = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  };
  const id = (name) => `${root.id}-${name}`;
  const choice = (name, text) => {
    const select = make("select", { id: id(name) });
    return [select, make("label", { for: id(name) }, make("span", {}, text), select)];
  };
  const [objectSelect, objectLabel] = choice("object", "Object");
  const [encoderSelect, encoderLabel] = choice("encoder", "Encoder");
  const [layerSelect, layerLabel] = choice("layer", "Layer");
  const stretch = make("input", { type: "checkbox", id: id("stretch") });
  const stretchLabel = make("label", { for: id("stretch"), class: "fm-check" }, stretch,
    "stretch the colours to this map");
  const picture = make("canvas", { role: "img", class: "fm-picture" });
  const heat = make("canvas", {
    class: "fm-heat", tabindex: "0", role: "application", "aria-roledescription": "shift map",
    "aria-label": "Cosine of every position with the reference. Arrow keys move the reference, "
      + "with Shift the position compared; Home goes to the centre, Escape ends the comparison.",
    "aria-describedby": id("values"),
  });
  const bar = make("canvas", { class: "fm-bar", role: "img" });
  const readout = make("p", { class: "fm-values", id: id("values"), "aria-live": "polite" });
  root.append(
    make("div", { class: "fm-controls" }, objectLabel, encoderLabel, layerLabel, stretchLabel),
    make("div", { class: "fm-panels" },
      make("div", {}, make("div", { class: "fm-title" }, "Drag the object: it is the reference"), picture),
      make("div", {}, make("div", { class: "fm-title" }, "Cosine with every other position"),
        make("div", { class: "fm-map" }, heat, bar))),
    readout,
    make("p", { class: "fm-hint" }, "Point at a position to compare it, click to make it the "
      + "reference. By keyboard, on the map: arrows move the reference, Shift and arrows the "
      + "position compared, Home goes to the centre, Esc ends the comparison."),
  );
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", data.title);

  const pictures = objects.map(({ src }) => {
    const image = new Image();
    image.src = src;
    image.onload = () => draw();
    return image;
  });
  const ground = background.startsWith("data:") ? new Image() : null;
  if (ground) {
    ground.onload = () => draw();
    ground.src = background;
  }
  objects.forEach(({ name }, index) => objectSelect.append(make("option", { value: index }, name)));
  const encoders = [...new Set(maps.map((map) => map.encoder))];
  encoders.forEach((name) => encoderSelect.append(make("option", { value: name }, name)));
  const listLayers = () => {
    layerSelect.replaceChildren();
    maps.forEach((map, index) => {
      if (map.encoder === state.encoder) {
        layerSelect.append(make("option", { value: index }, map.layer));
      }
    });
    layerSelect.value = maps.indexOf(state.map);
  };

  // ---- drawing ----------------------------------------------------------------------------------
  const style = (name, fallback) => getComputedStyle(root).getPropertyValue(name).trim() || fallback;
  const prepare = (node) => {
    const ratio = window.devicePixelRatio || 1;
    const { clientWidth: width, clientHeight: height } = node;
    node.width = Math.round(width * ratio);
    node.height = Math.round(height * ratio);
    const pen = node.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.font = "12px system-ui, sans-serif";
    return { pen, width, height };
  };
  const MARGIN = { left: 46, bottom: 40, top: 6, right: 6 };
  const plot = () => {
    const length = Math.min(heat.clientWidth - MARGIN.left - MARGIN.right,
      heat.clientHeight - MARGIN.top - MARGIN.bottom);
    return { x: MARGIN.left, y: MARGIN.top, length, cell: length / side };
  };
  const row = () => Array.from({ length: count },
    (_, index) => cosine(state.map, state.object, state.reference, index));
  const limits = (found) => {
    const low = stretch.checked ? Math.min(...found) : state.map.low;
    return low < 1 ? low : 1 - 1e-6;
  };

  const ring = (pen, x, y, radius, dashed) => {
    for (const [width, colour] of [[4, "#fff"], [2, "#000"]]) {
      pen.lineWidth = width;
      pen.strokeStyle = colour;
      pen.setLineDash(dashed ? [3, 3] : []);
      pen.beginPath();
      pen.arc(x, y, radius, 0, 2 * Math.PI);
      pen.stroke();
    }
    pen.setLineDash([]);
  };

  const drawPicture = () => {
    const { pen, width } = prepare(picture);
    const scale = width / canvas;
    if (ground) pen.drawImage(ground, 0, 0, width, width);
    else {
      pen.fillStyle = background;
      pen.fillRect(0, 0, width, width);
    }
    const shown = state.other ?? state.reference;
    const [left, top] = where(shown);
    const image = pictures[state.object];
    if (image.complete && image.naturalWidth) {
      pen.drawImage(image, left * scale, top * scale, size * scale, size * scale);
    }
    if (state.other !== null) {
      const [x, y] = where(state.reference);
      for (const [line, colour, dash] of [[3, "#fff", []], [1.5, "#000", [5, 4]]]) {
        pen.lineWidth = line;
        pen.strokeStyle = colour;
        pen.setLineDash(dash);
        pen.strokeRect(x * scale, y * scale, size * scale, size * scale);
      }
      pen.setLineDash([]);
    }
    picture.setAttribute("aria-label", `${objects[state.object].name} on the canvas, left edge at `
      + `${left} px, top edge at ${top} px`);
  };

  const drawHeat = (found) => {
    const { pen } = prepare(heat);
    const { x, y, length, cell } = plot();
    const low = limits(found);
    found.forEach((value, index) => {
      pen.fillStyle = rgb((value - low) / (1 - low));
      const left = x + (index % side) * cell;
      const top = y + Math.floor(index / side) * cell;
      pen.fillRect(left, top, cell + 0.5, cell + 0.5); // without a seam
    });
    const ink = style("--pst-color-text-base", "#222");
    pen.fillStyle = ink;
    pen.textAlign = "center";
    pen.textBaseline = "top";
    const ticks = [0, Math.floor((side - 1) / 2), side - 1];
    ticks.forEach((tick) => pen.fillText(offsets[tick], x + (tick + 0.5) * cell, y + length + 4));
    pen.fillText("left edge (px)", x + length / 2, y + length + 21);
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    ticks.forEach((tick) => pen.fillText(offsets[tick], x - 5, y + (tick + 0.5) * cell));
    pen.save();
    pen.translate(9, y + length / 2);
    pen.rotate(-Math.PI / 2);
    pen.textAlign = "center";
    pen.fillText("top edge (px)", 0, 0);
    pen.restore();
    const centre = (index) => [x + ((index % side) + 0.5) * cell,
      y + (Math.floor(index / side) + 0.5) * cell];
    const radius = Math.max(4, Math.min(9, 0.32 * cell));
    ring(pen, ...centre(state.reference), radius, false);
    if (state.other !== null && state.other !== state.reference) {
      ring(pen, ...centre(state.other), radius, true);
    }
  };

  const drawBar = (found) => {
    const { pen, height } = prepare(bar);
    const length = height - MARGIN.bottom - MARGIN.top;
    const low = limits(found);
    for (let step = 0; step < length; step += 1) {
      pen.fillStyle = rgb(1 - step / length);
      pen.fillRect(0, MARGIN.top + step, 14, 1.5);
    }
    pen.fillStyle = style("--pst-color-text-base", "#222");
    pen.textBaseline = "middle";
    const digits = 1 - low < 0.02 ? 4 : 1 - low < 0.2 ? 3 : 2;
    for (const share of [0, 0.25, 0.5, 0.75, 1]) {
      const at = MARGIN.top + (1 - share) * length;
      pen.fillText((low + share * (1 - low)).toFixed(digits), 19, Math.max(at, MARGIN.top + 5));
    }
    if (state.other !== null) { // where the compared position stands on the scale
      const share = (found[state.other] - low) / (1 - low);
      pen.fillRect(-1, MARGIN.top + (1 - share) * length - 1, 16, 2.5);
    }
    bar.setAttribute("aria-label", `colours run from ${low.toFixed(digits)} to 1`);
  };

  const text = (number) => number.toFixed(4);
  const place = (index) => {
    const [left, top] = where(index);
    return `(left ${left}, top ${top}) px`;
  };
  const say = (found) => {
    const others = found.filter((_, index) => index !== state.reference);
    const mean = others.reduce((sum, value) => sum + value, 0) / others.length;
    const words = [make("span", {}, `Reference ${place(state.reference)}. `)];
    if (state.other !== null) {
      words.push(make("strong", {},
        `Cosine at ${place(state.other)}: ${text(found[state.other])}. `));
    }
    words.push(make("span", {}, `Over the map: mean ${text(mean)}, least ${text(Math.min(...others))}. `));
    const floor = state.map.between?.[state.object];
    if (floor !== undefined) {
      words.push(make("span", {}, `Other objects in its place: ${text(floor)}.`));
    }
    readout.replaceChildren(...words);
  };
  function draw() {
    if (!root.isConnected || !heat.clientWidth) return;
    const found = row();
    drawPicture();
    drawHeat(found);
    drawBar(found);
    say(found);
  }

  // ---- interaction ------------------------------------------------------------------------------
  const set = (changes) => {
    Object.assign(state, changes);
    draw();
  };
  objectSelect.onchange = () => set({ object: Number(objectSelect.value) });
  encoderSelect.onchange = () => {
    const own = maps.filter((map) => map.encoder === encoderSelect.value);
    const map = own.find(({ layer }) => layer === state.map.layer) ?? own.find(({ start }) => start);
    set({ encoder: encoderSelect.value, map: map ?? own[0] });
    listLayers();
  };
  layerSelect.onchange = () => set({ map: maps[Number(layerSelect.value)] });
  stretch.onchange = draw;

  const under = (event) => {
    const box = heat.getBoundingClientRect();
    const { x, y, cell } = plot();
    const column = Math.floor((event.clientX - box.left - x) / cell);
    const line = Math.floor((event.clientY - box.top - y) / cell);
    const inside = column >= 0 && line >= 0 && column < side && line < side;
    return inside ? line * side + column : null;
  };
  heat.onpointermove = (event) => set({ other: under(event) });
  heat.onpointerleave = () => set({ other: null });
  heat.onclick = (event) => {
    const index = under(event);
    if (index !== null) set({ reference: index });
  };
  const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  heat.onkeydown = (event) => {
    const step = STEPS[event.key];
    if (step) {
      const from = event.shiftKey ? state.other ?? state.reference : state.reference;
      const clamp = (at) => Math.min(side - 1, Math.max(0, at));
      const to = clamp(Math.floor(from / side) + step[1]) * side + clamp((from % side) + step[0]);
      set(event.shiftKey ? { other: to } : { reference: to });
    } else if (event.key === "Home") set({ reference: middle });
    else if (event.key === "Escape") set({ other: null });
    else return;
    event.preventDefault(); // the page does not scroll
    event.stopPropagation(); // nor does a notebook change its cell
  };

  // Dragging the object moves the reference to the nearest position of the grid.
  let grip = null;
  const point = (event) => {
    const box = picture.getBoundingClientRect();
    const scale = box.width / canvas;
    return [(event.clientX - box.left) / scale, (event.clientY - box.top) / scale];
  };
  const nearest = (pixel) => offsets.reduce((best, offset, index) =>
    Math.abs(offset - pixel) < Math.abs(offsets[best] - pixel) ? index : best, 0);
  picture.onpointerdown = (event) => {
    const [x, y] = point(event);
    const [left, top] = where(state.reference);
    const held = x >= left && y >= top && x < left + size && y < top + size;
    grip = held ? [x - left, y - top] : [size / 2, size / 2];
    picture.setPointerCapture(event.pointerId);
    picture.onpointermove(event);
    event.preventDefault();
  };
  picture.onpointermove = (event) => {
    if (!grip) return;
    const [x, y] = point(event);
    set({ reference: nearest(y - grip[1]) * side + nearest(x - grip[0]), other: null });
  };
  picture.onpointerup = picture.onpointercancel = () => { grip = null; };

  listLayers();
  draw();
  new ResizeObserver(draw).observe(root);
  new MutationObserver(draw).observe(document.documentElement, // dark or light
    { attributes: true, attributeFilter: ["data-theme"] });
};
