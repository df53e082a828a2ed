"use strict";
// Light, dark, or as the system has it. A page opened from a disk may not be allowed to remember it.
(() => {
  const root = document.documentElement, button = document.getElementById("theme");
  const kept = { get: () => { try { return localStorage.getItem("theme"); } catch { return null; } },
    set: (value) => { try { localStorage.setItem("theme", value); } catch { /* for this page only */ } } };
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    document.dispatchEvent(new Event("themechange"));
  };
  if (kept.get() === "dark" || kept.get() === "light") root.dataset.theme = kept.get();
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    kept.set(root.dataset.theme);
    show();
  });
  system.addEventListener("change", show);
  show();
})();
