"""`weakseg doctor`: looks at a host or a pod as a server would find it, and says what to mend. One file a subject."""
