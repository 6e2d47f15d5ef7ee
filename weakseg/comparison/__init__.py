"""`weakseg compare --methods …`: training methods beside each other, on equal terms.

Backbone, augmentation, crop and images seen are those of one recipe; what a method wants beyond them is in
weakseg.presets. Every training is a process of its own, one after another, so that time and memory are that method's.
No torch here: methods are known by their files' names, and trained by `weakseg run`.
"""
