// Times are milliseconds throughout. Rows of the timeline are classes, columns are time.
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("timeline-data").textContent);
  const bytes = (text) => {
    const binary = atob(text), out = new Uint8Array(binary.length);
    for (let i = 0; i < out.length; i++) out[i] = binary.charCodeAt(i);
    return out;
  };
  const longs = (text) => {
    const raw = bytes(text), view = new DataView(raw.buffer), out = new Uint32Array(raw.length / 4);
    for (let i = 0; i < out.length; i++) out[i] = view.getUint32(4 * i, true);
    return out;
  };
  const clock = (ms) => {
    const s = Math.floor(ms / 1000), two = (n) => String(n).padStart(2, "0");
    return s >= 3600 ? `${Math.floor(s / 3600)}:${two(Math.floor(s / 60) % 60)}:${two(s % 60)}` : `${Math.floor(s / 60)}:${two(s % 60)}`;
  };
  // The last of sorted `starts` that is at most `time`; -1 if none is.
  const lastAt = (starts, time) => {
    let low = 0, high = starts.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (starts[middle] <= time) low = middle + 1; else high = middle;
    }
    return low - 1;
  };
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  // ---- Player: the audio element, or time alone where there is none

  const audio = $("audio"), silent = $("silent");
  let position = 0, playingSince = null;
  const playing = () => (audio ? !audio.paused : playingSince !== null);
  const now = () => {
    if (audio) return 1000 * audio.currentTime;
    if (playingSince === null) return position;
    return Math.min(data.duration, position + performance.now() - playingSince);
  };
  const seek = (ms) => {
    position = clamp(ms, 0, data.duration);
    if (audio) audio.currentTime = position / 1000;
    else if (playingSince !== null) playingSince = performance.now();
    update(position, true);
  };
  const toggle = () => {
    if (audio) {
      if (audio.paused) audio.play().catch(() => {}); else audio.pause();
      return;
    }
    position = now();
    if (playingSince === null && position >= data.duration) position = 0;
    playingSince = playingSince === null ? performance.now() : null;
    silent.textContent = playingSince === null ? "Play" : "Pause";
    tick();
  };
  const tick = () => {
    update(now(), false);
    if (!audio && playingSince !== null && now() >= data.duration) toggle();
    else if (playing()) requestAnimationFrame(tick);
  };
  if (audio) {
    audio.addEventListener("play", tick);
    for (const name of ["seeking", "seeked", "pause", "ended"]) audio.addEventListener(name, () => update(now(), false));
    audio.addEventListener("error", () => { $("unplayable").hidden = false; });
    if (audio.error) $("unplayable").hidden = false;
  } else silent.addEventListener("click", toggle);

  // ---- Transcript

  const timed = (selector, parent = document) => {
    const elements = [...parent.querySelectorAll(selector)];
    return { elements, starts: elements.map((e) => +e.dataset.s), ends: elements.map((e) => +e.dataset.e) };
  };
  const segments = timed(".segment"), sounds = timed(".sound");
  const words = new Map(); // of the segments that were played
  const wordsOf = (segment) => {
    if (!words.has(segment)) words.set(segment, timed(".w", segments.elements[segment]));
    return words.get(segment);
  };
  let segmentNow = -1, wordNow = null, soundsNow = new Set(), scrolledByHand = -1e9;
  const within = (list, time) => {
    const last = lastAt(list.starts, time);
    return last >= 0 && time < Math.max(list.ends[last], list.starts[last] + 1) ? last : -1;
  };

  // The text follows the audio, unless the reader has just scrolled. A seek shows where it went; but where the whole
  // page scrolls, a seek by pointer does not, since that would take away what was pointed at.
  const lines = $("lines");
  const follow = (element, sought) => {
    const pane = getComputedStyle(lines).overflowY === "auto";
    if (sought ? !pane && !followOnSeek : !playing() || performance.now() - scrolledByHand < 4000) return;
    const box = element.getBoundingClientRect();
    const top = pane ? lines.getBoundingClientRect().top : document.querySelector(".top").offsetHeight;
    if (box.top < top || box.bottom > innerHeight - 30) element.scrollIntoView({ block: "center" });
  };
  for (const name of ["wheel", "touchmove"]) {
    window.addEventListener(name, () => { scrolledByHand = performance.now(); }, { passive: true });
  }

  let followOnSeek = false; // during a seek by keyboard
  const update = (time, sought) => {
    if (!audio) $("clock").textContent = `${clock(time)} / ${clock(data.duration)}`;
    const segment = within(segments, time);
    if (segment !== segmentNow) {
      if (segmentNow >= 0) segments.elements[segmentNow].classList.remove("now");
      if (segment >= 0) {
        segments.elements[segment].classList.add("now");
        follow(segments.elements[segment], sought);
      }
      segmentNow = segment;
    }
    const list = segment >= 0 ? wordsOf(segment) : null;
    const word = list ? list.elements[within(list, time)] ?? null : null;
    if (word !== wordNow) {
      wordNow?.classList.remove("now");
      word?.classList.add("now");
      wordNow = word;
    }
    const heard = new Set();
    for (let i = lastAt(sounds.starts, time); i >= 0 && sounds.starts[i] > time - longestSound; i--) {
      if (time < sounds.ends[i]) heard.add(sounds.elements[i]);
    }
    for (const sound of soundsNow) if (!heard.has(sound)) sound.classList.remove("now");
    for (const sound of heard) sound.classList.add("now");
    soundsNow = heard;
    movePlayhead(time, sought);
  };
  const longestSound = sounds.starts.reduce((most, start, i) => Math.max(most, sounds.ends[i] - start), 0) + 1;

  $("transcript").addEventListener("click", (event) => {
    if (!getSelection().isCollapsed) return; // text is being selected
    const at = event.target.closest(".w, .sound, .segment");
    if (at) seek(+at.dataset.s);
  });

  // ---- Timeline

  const scroller = $("scroller"), space = $("space"), canvas = $("canvas"), playhead = $("playhead");
  const ROW = 20, RULER = 22;
  const windowTimes = longs(data.windows), indexes = longs(data.index), values = bytes(data.value);
  const windowStarts = windowTimes.filter((_, i) => i % 2 === 0), windowEnds = windowTimes.filter((_, i) => i % 2 === 1);
  let offset = 0;
  const classes = data.classes.map((name, i) => {
    const first = offset;
    offset += data.counts[i];
    return { name, shown: name.replaceAll("_", " "), first, last: offset, events: data.events[i], hidden: false };
  });
  let rows = classes, scale = 0, fitted = true, drawn = false, style = {}; // scale: pixels per millisecond
  const gutter = () => Math.round(clamp(scroller.clientWidth * 0.28, 84, 190));
  const plotWidth = () => Math.max(50, scroller.clientWidth - gutter());
  const fitScale = () => plotWidth() / Math.max(1, data.duration);
  const MOST = 0.12; // pixels per millisecond
  const left = () => scroller.scrollLeft / scale; // time at the left edge of the plot

  const resize = () => {
    if (!classes.length || !scroller.clientWidth) return;
    scale = fitted ? fitScale() : clamp(scale, fitScale(), Math.max(MOST, fitScale()));
    space.style.width = `${Math.floor(gutter() + data.duration * scale)}px`;
    space.style.height = `${RULER + Math.max(1, rows.length) * ROW + (fitted ? 0 : 10)}px`; // for a scroll bar
    const ratio = window.devicePixelRatio || 1;
    const width = scroller.clientWidth, height = Math.min(scroller.clientHeight, space.offsetHeight);
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    redraw();
  };
  const redraw = () => {
    if (drawn) return;
    drawn = true;
    requestAnimationFrame(() => { drawn = false; draw(); });
  };
  const zoom = (factor, at = null) => {
    const x = at ?? clamp((now() - left()) * scale, 0, plotWidth());
    const time = left() + x / scale;
    fitted = scale * factor <= fitScale();
    scale = clamp(scale * factor, fitScale(), Math.max(MOST, fitScale()));
    resize();
    scroller.scrollLeft = time * scale - x;
    movePlayhead(now(), false);
  };

  const readStyle = () => {
    const css = getComputedStyle(document.documentElement), get = (name) => css.getPropertyValue(name).trim();
    style = { ink: get("--ink"), soft: get("--soft"), line: get("--line"), raised: get("--raised"), event: get("--event"),
      shades: Array.from({ length: 256 }, (_, i) => `rgba(${get("--accent-rgb")}, ${(0.04 + 0.96 * i / 255).toFixed(3)})`),
      font: getComputedStyle(document.body).fontFamily };
  };

  const draw = () => {
    const pen = canvas.getContext("2d"), ratio = window.devicePixelRatio || 1;
    const width = canvas.width / ratio, height = canvas.height / ratio, edge = gutter();
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.fillStyle = style.raised;
    pen.fillRect(0, 0, width, height);
    const top = scroller.scrollTop;
    const first = Math.max(0, Math.floor(top / ROW)), last = Math.min(rows.length, Math.ceil((top + height - RULER) / ROW));
    pen.save();
    pen.beginPath();
    pen.rect(edge, RULER, width - edge, height - RULER);
    pen.clip();
    for (let row = first; row < last; row++) drawRow(pen, rows[row], RULER + row * ROW - top, edge, width - edge);
    pen.restore();
    drawNames(pen, first, last, top, edge, width, height);
    drawRuler(pen, edge, width);
  };

  // The greatest probability that falls on each column of pixels, drawn in runs of the same shade.
  const drawRow = (pen, row, y, edge, width) => {
    const from = left(), to = from + width / scale, columns = new Uint8Array(Math.ceil(width) + 1);
    const firstWindow = Math.max(0, lastAt(windowEnds, from)), lastWindow = lastAt(windowStarts, to);
    let low = row.first, high = row.last;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (indexes[middle] < firstWindow) low = middle + 1; else high = middle;
    }
    for (let i = low; i < row.last && indexes[i] <= lastWindow; i++) {
      const a = Math.max(0, Math.floor((windowStarts[indexes[i]] - from) * scale));
      const b = Math.min(columns.length, Math.max(a + 1, Math.floor((windowEnds[indexes[i]] - from) * scale)));
      for (let x = a; x < b; x++) if (values[i] > columns[x]) columns[x] = values[i];
    }
    for (let x = 0; x < columns.length;) {
      let end = x + 1;
      while (end < columns.length && columns[end] === columns[x]) end++;
      if (columns[x]) {
        pen.fillStyle = style.shades[columns[x]];
        pen.fillRect(edge + x, y + 3, end - x, ROW - 6);
      }
      x = end;
    }
    pen.strokeStyle = pen.fillStyle = style.event;
    pen.lineWidth = 1.5;
    for (const [start, end] of row.events) {
      if (end < from || start > to) continue;
      const a = edge + (start - from) * scale, b = edge + (end - from) * scale;
      if (b - a < 5) pen.fillRect(a, y + ROW - 4, Math.max(1.5, b - a), 3); // too narrow for an outline: underlined
      else pen.strokeRect(a + 0.75, y + 2.25, b - a - 1.5, ROW - 4.5);
    }
  };
  const shortened = (pen, text, room) => {
    if (pen.measureText(text).width <= room) return text;
    let length = text.length;
    while (length > 1 && pen.measureText(`${text.slice(0, length)}…`).width > room) length--;
    return `${text.slice(0, length).trimEnd()}…`;
  };
  const drawNames = (pen, first, last, top, edge, width, height) => {
    pen.font = `12px ${style.font}`;
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    pen.strokeStyle = style.line;
    pen.lineWidth = 1;
    for (let row = first; row < last; row++) {
      const y = RULER + row * ROW - top;
      pen.fillStyle = rows[row].events.length ? style.ink : style.soft;
      pen.fillText(shortened(pen, rows[row].shown, edge - 16), edge - 8, y + ROW / 2 + 0.5);
      pen.beginPath();
      pen.moveTo(0, y + 0.5);
      pen.lineTo(width, y + 0.5);
      pen.stroke();
    }
    pen.beginPath();
    pen.moveTo(edge - 0.5, 0);
    pen.lineTo(edge - 0.5, height);
    pen.stroke();
    if (!rows.length) {
      pen.textAlign = "left";
      pen.fillStyle = style.soft;
      pen.fillText("No class is left by the filter.", edge + 8, RULER + ROW / 2);
    }
  };
  const STEPS = [0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 18000, 36000].map((s) => 1000 * s);
  const drawRuler = (pen, edge, width) => {
    pen.fillStyle = style.raised;
    pen.fillRect(0, 0, width, RULER);
    pen.font = `11px ${style.font}`;
    pen.textAlign = "left";
    pen.textBaseline = "middle";
    const step = STEPS.find((s) => s * scale >= 64) ?? STEPS.at(-1);
    for (let time = Math.floor(left() / step) * step; time <= left() + (width - edge) / scale; time += step) {
      const x = Math.round(edge + (time - left()) * scale);
      if (x < edge) continue;
      pen.fillStyle = style.line;
      pen.fillRect(x, 0, 1, RULER);
      const label = step < 1000 ? (time / 1000).toFixed(1) : clock(time);
      if (x + 4 + pen.measureText(label).width > width) continue;
      pen.fillStyle = style.soft;
      pen.fillText(label, x + 4, RULER / 2);
    }
    pen.fillStyle = style.line;
    pen.fillRect(0, RULER - 1, width, 1);
  };

  const movePlayhead = (time, sought) => {
    if (!scale) return;
    let x = (time - left()) * scale;
    if ((playing() || sought) && (x < 0 || x > plotWidth()) && performance.now() - pannedByHand > 4000) {
      scroller.scrollLeft = Math.max(0, time * scale - 0.15 * plotWidth());
      x = (time - left()) * scale;
    }
    playhead.hidden = x < 0 || x > plotWidth() + 1;
    playhead.style.transform = `translateX(${gutter() + x}px)`;
  };
  let pannedByHand = -1e9;
  for (const name of ["wheel", "touchmove", "pointerdown"]) {
    scroller.addEventListener(name, () => { pannedByHand = performance.now(); }, { passive: true });
  }
  scroller.addEventListener("scroll", () => { redraw(); movePlayheadOnly(); }, { passive: true });
  const movePlayheadOnly = () => {
    const x = (now() - left()) * scale;
    playhead.hidden = x < 0 || x > plotWidth() + 1;
    playhead.style.transform = `translateX(${gutter() + x}px)`;
  };

  // What lies at a point: its row (null on the ruler), time (null on a name), window and event.
  const pointed = (event) => {
    const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    const row = y < RULER ? null : rows[Math.floor((y - RULER + scroller.scrollTop) / ROW)] ?? null;
    if (x < gutter()) return { row, time: null };
    const time = clamp(left() + (x - gutter()) / scale, 0, data.duration);
    if (!row) return { row, time };
    const slack = 3 / scale, own = indexes.subarray(row.first, row.last);
    let probability = null, start = null, end = null;
    for (let number = lastAt(windowStarts, time); number >= 0 && time < windowEnds[number]; number--) { // may overlap
      const at = lastAt(own, number);
      if (at < 0 || own[at] !== number || values[row.first + at] / 255 <= probability) continue;
      [probability, start, end] = [values[row.first + at] / 255, windowStarts[number], windowEnds[number]];
    }
    const found = row.events.find(([a, b]) => a <= time && time < b) ?? row.events.find(([a, b]) => a - slack <= time && time < b + slack);
    return { row, time, probability, start, end, event: found ?? null };
  };
  const percent = (p) => `${Math.round(100 * p)} %`;
  canvas.addEventListener("pointermove", (event) => {
    const { row, time, probability = null, start, end, event: found } = pointed(event);
    const parts = row ? [row.shown] : [];
    if (time !== null && probability === null) parts.push(clock(time));
    if (probability !== null) parts.push(`${percent(probability)} at ${clock(start)}–${clock(end)}`);
    if (found) parts.push(`event ${clock(found[0])}–${clock(found[1])}, ${percent(found[2])}`);
    $("pointed").textContent = parts.join(" · ");
  });
  canvas.addEventListener("pointerleave", () => { $("pointed").textContent = ""; });
  canvas.addEventListener("click", (event) => {
    const { row, time, start, event: found } = pointed(event);
    pannedByHand = -1e9;
    if (time === null && row) seek(peak(row));
    else if (time !== null) seek(found ? found[0] : start ?? time);
  });
  const peak = (row) => {
    let best = -1;
    for (let i = row.first; i < row.last; i++) if (best < 0 || values[i] > values[best]) best = i;
    return best < 0 ? row.events[0][0] : windowStarts[indexes[best]];
  };
  scroller.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 300), clamp(event.clientX - canvas.getBoundingClientRect().left - gutter(), 0, plotWidth()));
  }, { passive: false });
  $("in").addEventListener("click", () => zoom(2));
  $("out").addEventListener("click", () => zoom(0.5));
  $("fit").addEventListener("click", () => zoom(0));

  // ---- Filters

  const details = $("classes"), chips = details.querySelector(".chips");
  const filter = () => {
    const wanted = $("filter").value.trim().toLowerCase(), eventsOnly = $("events-only").checked;
    rows = classes.filter((c) => !c.hidden && (!eventsOnly || c.events.length) && c.shown.toLowerCase().includes(wanted));
    const names = new Set(rows.map((row) => row.name)), all = rows.length === classes.length;
    for (const sound of sounds.elements) sound.hidden = !all && !names.has(sound.dataset.c);
    for (const list of document.querySelectorAll(".sounds")) list.hidden = !all && !list.querySelector(".sound:not([hidden])");
    details.firstElementChild.textContent = all ? `${classes.length} classes` : `${rows.length} of ${classes.length} classes`;
    scroller.scrollTop = 0;
    resize();
  };
  const hide = (which) => {
    classes.forEach((c) => { c.hidden = which(c); });
    chips.querySelectorAll("[aria-pressed]").forEach((chip, i) => chip.setAttribute("aria-pressed", String(!classes[i].hidden)));
    filter();
  };
  details.addEventListener("toggle", () => {
    if (chips.childElementCount) return;
    const button = (text, action) => {
      const element = document.createElement("button");
      element.type = "button";
      element.className = "button";
      element.textContent = text;
      element.addEventListener("click", action);
      return element;
    };
    chips.append(button("All", () => hide(() => false)), button("None", () => hide(() => true)), ...classes.map((c) => {
      const chip = button(c.shown, () => {
        c.hidden = !c.hidden;
        chip.setAttribute("aria-pressed", String(!c.hidden));
        filter();
      });
      chip.setAttribute("aria-pressed", String(!c.hidden));
      return chip;
    }));
  });
  $("filter").addEventListener("input", filter);
  $("events-only").addEventListener("change", filter);

  // ---- Keyboard

  const step = (direction) => {
    if (!segments.starts.length) return;
    const time = now(), at = lastAt(segments.starts, time + 1);
    // Back goes to the beginning of a segment first, as every player does
    const to = direction > 0 ? at + 1 : at >= 0 && time - segments.starts[at] > 1500 ? at : at - 1;
    if (to < segments.starts.length) seekShown(segments.starts[Math.max(0, to)]);
  };
  const seekShown = (ms) => {
    followOnSeek = true;
    seek(ms);
    followOnSeek = false;
  };
  const showHelp = () => { if (!$("help").open) $("help").showModal(); };
  const KEYS = {
    " ": toggle, ArrowLeft: () => seekShown(now() - 5000), ArrowRight: () => seekShown(now() + 5000),
    ArrowUp: () => step(-1), ArrowDown: () => step(1), k: () => step(-1), j: () => step(1),
    "+": () => zoom(2), "=": () => zoom(2), "-": () => zoom(0.5), "?": showHelp,
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
    const target = event.target, writing = target.matches("input:not([type=checkbox]), select, textarea");
    const pressing = event.key === " " && target.matches("button, summary, input");
    const action = KEYS[event.key];
    if (!action || writing || pressing) return;
    event.preventDefault();
    event.stopPropagation();
    action();
  }, true);
  // A button that was clicked does not keep the keyboard, so that the space bar goes on to mean play
  document.addEventListener("mousedown", (event) => { if (event.target.closest("button, label, summary")) event.preventDefault(); });
  $("help-button").addEventListener("click", showHelp);

  // ---- Begin

  readStyle();
  document.addEventListener("themechange", () => { readStyle(); redraw(); });
  new ResizeObserver(() => { resize(); movePlayheadOnly(); }).observe(scroller);
  filter();
  update(0, false);
})();
