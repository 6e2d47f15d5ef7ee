{{- define "weakseg.selector" -}}
app.kubernetes.io/name: weakseg
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: server
{{- end }}

{{- define "weakseg.pod" -}}
{{ include "weakseg.selector" . }}
app.kubernetes.io/part-of: weakseg
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- define "weakseg.labels" -}}
{{ include "weakseg.pod" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "weakseg.image" -}}
{{ .Values.image.repository }}{{ if .Values.image.digest }}@{{ .Values.image.digest }}{{ else }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ end }}
{{- end }}

{{- define "weakseg.settings" -}}
{{- range $key, $value := .Values.settings }}
WEAKSEG_{{ upper $key }}: {{ $value | toString | quote }}
{{- end }}
{{- if .Values.mtls.enabled }}
WEAKSEG_TLS_CERT: /etc/weakseg/tls/tls.crt
WEAKSEG_TLS_KEY: /etc/weakseg/tls/tls.key
WEAKSEG_TLS_CLIENT_CA: /etc/weakseg/tls/ca.crt
{{- end }}
{{- end }}

{{- define "weakseg.restricted" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "weakseg.behavior" -}}
scaleUp:
  stabilizationWindowSeconds: 0
  policies:
    - {type: Percent, value: 100, periodSeconds: 30}
    - {type: Pods, value: 2, periodSeconds: 30}
  selectPolicy: Max
scaleDown:
  stabilizationWindowSeconds: 300
  policies:
    - {type: Percent, value: 20, periodSeconds: 60}
    - {type: Pods, value: 1, periodSeconds: 60}
  selectPolicy: Max
{{- end }}
