// Names for the sliders: the widgets' slider handles can be reached by keyboard, but tell a screen
// reader neither what they move nor what they read.
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
    new MutationObserver(tell).observe(readout, { childList: true, characterData: true, subtree: true });
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
