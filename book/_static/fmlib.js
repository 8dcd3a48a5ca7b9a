// Two repairs to the widgets' JavaScript as it stands in a page.

// 1. It typesets labels with MathJax 2, as soon as there is any object of that name; the pages have
// MathJax 3, so that a page with both fails with "undefined (reading 'Queue')" or not, as the
// scripts happen to arrive. Whatever becomes window.MathJax gets the one call that is needed.
(function () {
  "use strict";
  var hub = {
    Queue: function (call) {
      var math = window.MathJax;
      if (math && math.typesetPromise) math.typesetPromise([call[2]]).catch(console.warn);
    },
  };
  function equip(value) {
    if (value && typeof value === "object" && !("Hub" in value)) {
      // Not enumerable, or MathJax would take it for a part of its configuration.
      Object.defineProperty(value, "Hub", { value: hub, enumerable: false });
    }
    return value;
  }
  var current = equip(window.MathJax);
  Object.defineProperty(window, "MathJax", {
    configurable: true,
    enumerable: true,
    get: function () {
      return current;
    },
    set: function (value) {
      current = equip(value);
    },
  });
})();

// 2. The handles of its sliders can be reached by keyboard, but tell a screen reader neither what
// they move nor what they read.
(function () {
  "use strict";
  function name(slider) {
    var handle = slider.querySelector('[role="slider"]');
    var label = slider.querySelector(".widget-label");
    var readout = slider.querySelector(".widget-readout");
    if (!handle || !label || handle.hasAttribute("aria-label")) return;
    handle.setAttribute("aria-label", label.textContent.trim());
    if (!readout) return;
    var tell = function () {
      handle.setAttribute("aria-valuetext", readout.textContent.trim());
    };
    var changes = { childList: true, characterData: true, subtree: true };
    new MutationObserver(tell).observe(readout, changes);
    tell();
  }
  function look() {
    document.querySelectorAll(".widget-slider").forEach(name);
  }
  document.addEventListener("DOMContentLoaded", function () {
    look();
    new MutationObserver(look).observe(document.body, { childList: true, subtree: true });
  });
})();
